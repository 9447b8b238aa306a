from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.augmented import rog
from leakatlas.attacks.optimization.augmented.rog import ROG
from leakatlas.bench import harness
from leakatlas.blocks import denoiser, matching
from leakatlas.blocks.denoiser import Denoiser
from leakatlas.blocks.watch import Watch
from leakatlas.data import bundled
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.fl import FedAVG, FedSGD, Stage, View, replay
from leakatlas.threat import Grant, Knowledge
from tests.attacks.case import Case
from tests.conftest import build_stage, photos, relative_error, surrogate

SCENE = {"model": "lenet", "settings": {"width": 4}}
CASE = Case({"steps": 3, "pairs": 4, "epochs": 2, "width": 4}, SCENE, boxed=True)
SHORT = ROG(steps=3, pairs=4, epochs=2, width=4)
PLAIN = replace(SHORT, enhance="none")
LABELS = frozenset({Grant.LABELS})


@pytest.fixture(autouse=True)
def own_cache(cache: Path) -> None:
    del cache


def stage_of(**changes: Any) -> Stage:
    return build_stage(
        **{**SCENE, "letter": "D", "grants": LABELS, "public": surrogate(), **changes}
    )


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    return view, client.x, client.y


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


# -- the search ------------------------------------------------------------------------------------


def test_enlargement_is_linear() -> None:
    z, w = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    both = rog.enlarged(2.5 * z - w, (3, 16, 16))
    apart = 2.5 * rog.enlarged(z, (3, 16, 16)) - rog.enlarged(w, (3, 16, 16))
    torch.testing.assert_close(both, apart)
    constant = rog.enlarged(torch.full((1, 3, 2, 2), 0.3).double(), (3, 8, 8))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))


def test_an_enlarged_image_is_explained_exactly_by_what_it_was_enlarged_from() -> None:
    z = noise(2, 3, 2, 2)
    view, _, _ = seen()
    x = view.box.normalize(rog.enlarged(z, (3, 8, 8)))
    own = view.rehearse(x, torch.tensor([0, 1]))
    distance = matching.relative_l2(own.replay(x, torch.tensor([0, 1])), own.update.tensors)
    assert float(distance.detach()) < 1e-20
    end = PLAIN.search(own, own.labels, generator=torch.Generator().manual_seed(0), watch=Watch())
    assert end.best["z"].shape == z.shape
    assert float(end.criterion) > 1e-6


def test_one_local_step_is_a_single_gradient() -> None:
    once = FedAVG(epochs=1, batch_size=2, lr=0.03, mode="eval")
    averaged = harness.run_trial(stage_of(protocol=once), PLAIN).found
    single = harness.run_trial(stage_of(protocol=FedSGD()), PLAIN).found
    torch.testing.assert_close(averaged.images, single.images, rtol=1e-6, atol=1e-6)


def test_the_unrolled_update_is_the_clients_at_the_received_weights_and_not_at_the_trained() -> (
    None
):
    """The released attacker unrolls from the weights after training."""
    protocol = FedAVG(epochs=3, batch_size=2, lr=0.5, mode="eval")
    view, x, y = seen(protocol=protocol)
    sent = dict(view.update.tensors)
    assert relative_error(view.replay(x, y), sent) < 1e-10
    model = view.model
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(sent[name])
    late = replay.client(model, protocol, view.update)(x, y)
    assert relative_error(late, sent) > 1e-3


def test_a_pruned_update_is_matched_where_it_holds_something() -> None:
    """Adaptive: zero at the truth; as published, what was dropped stays as a distance."""
    view, x, y = seen(defenses=(GradientPruning.top_k(0.9),))
    g = dict(view.update.tensors)
    aware = matching.relative_l2(view.replayer(adaptive=True)(x, y), g)
    blind = matching.relative_l2(view.replayer(adaptive=False)(x, y), g)
    assert float(aware.detach()) < 1e-20 < 1e-3 < float(blind.detach())
    images = [replace(PLAIN, adaptive=on)(view).images for on in (True, False)]
    assert not torch.equal(*images)


def test_fewer_unknowns_resist_pruning_better_than_pixels() -> None:
    """Ablation: full resolution fits the damaged update, not the image."""
    errors = {1: 0.0, 2: 0.0}
    for start in range(2):
        victims = photos(8, 16).subset([start, start + 4])
        stage = stage_of(size=16, victims=victims, public=bundled.patches(16, 4),
                         defenses=(GradientPruning.top_k(0.9),))  # fmt: skip
        for scale in errors:
            attack = ROG(steps=40, scale=scale, enhance="none")
            trial = harness.run_trial(stage, attack)
            errors[scale] += float((trial.images - trial.truth.images).square().mean())
    assert errors[2] < errors[1]


# -- the enhancement -------------------------------------------------------------------------------


def test_the_network_begins_as_the_identity_and_learns_to_undo_damage() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Denoiser(3, 8)
    originals = bundled.patches(16, 48).images
    small = torch.nn.functional.avg_pool2d(originals, 2)
    damaged = rog.enlarged(small, (3, 16, 16))
    with torch.no_grad():
        assert torch.equal(network(damaged), damaged)
    denoiser.fit(network, damaged[:40], originals[:40], epochs=40,
            generator=torch.Generator().manual_seed(0), watch=Watch())  # fmt: skip
    with torch.no_grad():
        after = (network(damaged[40:]) - originals[40:]).square().mean()
    assert float(after) < 0.97 * float((damaged[40:] - originals[40:]).square().mean())


def test_no_victim_teaches_the_network() -> None:
    """Equal lessons whoever the victim is: the update's values are no part of them."""
    lessons = []
    for victims in (photos(2, 8), photos(6, 8).subset([4, 5])):
        view, _, _ = seen(victims=victims)
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        lessons.append(SHORT.lesson(view, generator=generator, watch=Watch()))
    assert all(torch.equal(t, lessons[1][name]) for name, t in lessons[0].items())


def test_public_images_are_needed_for_the_network_alone() -> None:
    assert PLAIN.knowledge() == Knowledge.UPDATES | Knowledge.BASIC
    view, _, _ = seen(letter="B", public=None)
    assert SHORT.missing(view) == Knowledge.SURROGATE
    assert PLAIN(view).status == "complete"
    learned, _, _ = seen()
    assert "surrogate" in SHORT(learned).reads
    assert SHORT.outlook(learned).verdict == "unknown"
    other, _, _ = seen(public=surrogate(16))
    assert SHORT.outlook(other).verdict == "hopeless"
