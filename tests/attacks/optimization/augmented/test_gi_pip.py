from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.optimization.augmented import gi_pip
from leakatlas.attacks.optimization.augmented.gi_pip import GIPIP, Autoencoder, anomaly, errors
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import bundled
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.fl import Stage
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, photos, surrogate

SCENE = {"model": "lenet", "settings": {"width": 4}}
CASE = Case({"steps": 3, "epochs": 1, "width": 2}, SCENE, boxed=True)
SHORT = GIPIP(steps=3, epochs=1, width=2)
LABELS = frozenset({Grant.LABELS})


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> None:
    del cache


def stage_of(**changes: Any) -> Stage:
    return build_stage(
        **{**SCENE, "letter": "D", "grants": LABELS, "public": surrogate(), **changes}
    )


@pytest.fixture(scope="module")
def taught() -> tuple[Autoencoder, float, Tensor]:
    """An autoencoder of bundled crops, its tau, and crops that it never saw."""
    public = bundled.patches(16, 320)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learned = GIPIP(epochs=40).prepare(
            public.subset(list(range(256))), nn.Identity(),
            generator=torch.Generator().manual_seed(0), watch=Watch(),
        )  # fmt: skip
    like = torch.zeros(1)
    return Autoencoder.of(learned, like), float(learned["tau"]), public.images[256:]


def test_the_score_is_zero_at_tau_and_symmetric_around_it() -> None:
    class Off(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return u - 0.1

    u = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for per_image in (False, True):
        assert float(anomaly(Off(), u, 0.01, per_image=per_image)) == pytest.approx(0, abs=1e-15)
        above = float(anomaly(Off(), u, 0.01 + 0.004, per_image=per_image))
        below = float(anomaly(Off(), u, 0.01 - 0.004, per_image=per_image))
        assert above == pytest.approx(0.004) == pytest.approx(below)


def test_images_of_a_batch_make_up_for_each_other_unless_scored_one_by_one(
    taught: tuple[Autoencoder, float, Tensor],
) -> None:
    network, _, real = taught
    u = torch.stack([real[0], torch.full_like(real[0], 0.5)])
    tau = float(errors(network, u).mean().detach())
    assert float(anomaly(network, u, tau, per_image=False)) < 1e-8
    assert float(anomaly(network, u, tau, per_image=True)) > 1e-4


def test_real_images_score_less_than_noise_and_than_a_constant(
    taught: tuple[Autoencoder, float, Tensor],
) -> None:
    network, tau, real = taught
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(1))
    grey = real.mean((1, 2, 3), keepdim=True).expand_as(real)
    score = anomaly(network, real, tau, per_image=False)
    assert float(score) < float(anomaly(network, noise, tau, per_image=False))
    assert float(score) < float(anomaly(network, grey, tau, per_image=False))
    bare = [float(errors(network, u).mean()) for u in (grey, real)]
    assert bare[0] < bare[1]  # without the absolute value the constant would win


def test_an_untrained_autoencoder_sees_no_structure(
    taught: tuple[Autoencoder, float, Tensor],
) -> None:
    """Theory's failure: it scores an image like the same pixels in another order."""
    network, _, real = taught
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Autoencoder(3, 12).eval()
    order = torch.randperm(16 * 16, generator=torch.Generator().manual_seed(2))
    mixed = real.flatten(2)[:, :, order].reshape(real.shape)

    def gap(judge: nn.Module) -> float:
        with torch.no_grad():
            before, after = errors(judge, real), errors(judge, mixed)
        return float(((after - before) / before).abs().median())

    assert gap(fresh) < 0.05
    assert gap(network) > 1.0


def test_the_slope_passes_the_clip_inside_the_box(
    taught: tuple[Autoencoder, float, Tensor],
) -> None:
    network = Autoencoder(3, 2).double().requires_grad_(False)
    smooth = nn.Sequential(
        *(nn.Softplus() if isinstance(m, nn.ReLU) else m for m in network.encoder),
        *(nn.Softplus() if isinstance(m, nn.ReLU) else m for m in network.decoder),
    )
    u = (0.2 + 0.6 * taught[2][:1, :, :8, :8].double()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: anomaly(smooth, x.clamp(0, 1), 0.5, per_image=False), (u,)
    )
    saturated = torch.full_like(u, 1.5).requires_grad_()
    anomaly(smooth, saturated.clamp(0, 1), 0.5, per_image=False).backward()
    assert saturated.grad is not None and not bool(saturated.grad.any())


def test_without_the_score_it_is_cosine_matching_under_total_variation() -> None:
    bare = replace(SHORT, score_weight=0.0, tv_weight=1e-2)
    assert bare.knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    plain = InvertingGradients(steps=3, tv_weight=1e-2, optimizer="unsigned")
    view, _ = harness.observe(stage_of(), bare)
    own = [
        attack.run(view, generator=torch.Generator().manual_seed(0), watch=Watch()).images
        for attack in (bare, plain)
    ]
    assert torch.equal(*own)


def test_no_victim_teaches_the_autoencoder() -> None:
    """Disjoint by content: the lesson's images are the public ones, and none of them is private."""
    stage = stage_of()
    assert stage.surrogate is not None
    private = {x.numpy().tobytes() for x in stage.victims[0].images}
    assert not private & {x.numpy().tobytes() for x in stage.surrogate.images}
    lessons = []
    for victims in (photos(2, 8), photos(6, 8).subset([4, 5])):
        view, _ = harness.observe(stage_of(victims=victims), SHORT)
        lessons.append(SHORT.artefact(view.surrogate, view.model))
    assert all(torch.equal(t, lessons[1][name]) for name, t in lessons[0].items())


def test_the_autoencoder_fits_other_shapes() -> None:
    for shape in ((1, 28, 28), (3, 32, 32), (3, 20, 36)):
        assert Autoencoder(shape[0], 2)(torch.rand(1, *shape)).shape == (1, *shape)


def test_a_calibrated_score_helps_where_the_update_is_damaged() -> None:
    """Ablation: without the score the same search is worse on a pruned update."""
    reached = {0.0: 0.0, 3.0: 0.0}
    for start in range(2):
        victims = photos(8, 16).subset([start, start + 4])
        stage = stage_of(
            size=16, victims=victims, public=bundled.patches(16, 128),
            defenses=(GradientPruning.top_k(0.9),),
        )  # fmt: skip
        for weight in reached:
            attack = replace(GIPIP.tuned(), steps=60, tv_weight=0.0, score_weight=weight, epochs=20)
            trial = harness.run_trial(stage, attack)
            reached[weight] += float((trial.images - trial.truth.images).square().mean())
    assert reached[3.0] < reached[0.0]


def test_outlook_and_needs() -> None:
    view, _ = harness.observe(stage_of(public=surrogate(16)), SHORT)
    assert SHORT.outlook(view).verdict == "hopeless"
    assert gi_pip.GIPIP().knowledge() & Knowledge.SURROGATE
