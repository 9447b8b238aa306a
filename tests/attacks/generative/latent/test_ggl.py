"""GGL: estimates of defenses, the search, and what each ingredient is good for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakatlas.attacks.generative.latent import ggl
from leakatlas.attacks.generative.latent.ggl import GGL
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.defenses.heuristic.perturbation.soteria import Soteria
from leakatlas.errors import UnknownName
from leakatlas.fl import Defense, Stage, View
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage
from tests.priors.support import SIZE, generator, held

CASE = Case(
    {"rounds": 2, "population": 3, "prior_steps": 3, "prior_latent": 8},
    {**LENET, "size": 8, "examples": 1},
    boxed=True,
)

QUICK = GGL(rounds=30, population=16, kl_weight=0.0, spread=0.5, prior="held")

DEFENSES: dict[str, Defense] = {
    "clipping": Clipping(max_norm=0.05),
    "pruning": GradientPruning.top_k(0.9, error_feedback=False),
    "soteria": Soteria(prune=0.5),
}


def _target(seed: int = 5) -> ImageSet:
    z = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    return ImageSet(generator()(z), torch.tensor([3]), tuple("0123456789"), "drawn")


def _scene(kind: str | None = None, dtype: torch.dtype = torch.float64) -> Stage:
    return build_stage(
        examples=1, size=SIZE, letter="D", victims=_target(), dtype=dtype,
        defenses=() if kind is None else (DEFENSES[kind],), grants=frozenset({Grant.LABELS}),
    )  # fmt: skip


def _view(kind: str | None = None) -> tuple[View, Tensor]:
    scene = _scene(kind)
    view, _ = harness.observe(scene, QUICK)
    return view, scene.box.normalize(scene.victims[0].images.double())


# -- the defense ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEFENSES)
def test_the_adaptive_loss_is_0_at_the_truth_and_the_plain_one_is_not(kind: str) -> None:
    view, x = _view(kind)
    g = dict(view.update.tensors)
    replay = view.replayer(adaptive=False)
    trial = {n: t.detach() for n, t in replay(x, torch.tensor([3])).items()}
    plain = float(ggl.sq_mean(trial, g))
    adaptive = float(ggl.sq_mean(QUICK.defense(view, g)(trial), g))
    assert QUICK.kinds(view) == (kind,)
    assert plain > 1e-6 and adaptive < 1e-9 * plain


def test_the_estimated_strengths_are_the_true_ones() -> None:
    view, _ = _view("clipping")
    assert float(ggl.total_norm(view.update.tensors)) == pytest.approx(0.05, rel=1e-4)
    view, _ = _view("pruning")
    assert ggl.pruning_rate(view.update.tensors) == pytest.approx(0.9, abs=0.01)
    view, _ = _view("soteria")
    head = ggl.head_of(view)
    row = view.update.tensors[head][0]
    assert float((row == 0).float().mean()) == 0.5


def test_an_adversary_that_knows_no_kind_adapts_to_none_and_one_may_assume_any() -> None:
    view, x = _view("clipping")
    oblivious = replace(QUICK, adapt=())
    g = dict(view.update.tensors)
    trial = view.replayer(adaptive=False)(x, torch.tensor([3]))
    through = oblivious.defense(view, g)(trial)
    assert all(torch.equal(through[n], trial[n]) for n in g)
    assert replace(QUICK, adapt=("pruning",)).kinds(view) == ("pruning",)
    with pytest.raises(UnknownName, match="noise"):
        replace(QUICK, adapt=("noise",)).kinds(view)


def test_a_trial_below_the_bound_is_not_scaled_up() -> None:
    g = {"w": torch.tensor([3.0, 4.0])}
    clip = ggl.clipping(g)
    assert torch.equal(clip({"w": torch.tensor([0.3, 0.4])})["w"], torch.tensor([0.3, 0.4]))
    assert float(ggl.total_norm(clip({"w": torch.tensor([30.0, 0.0])}))) == pytest.approx(5.0)


# -- the search ----------------------------------------------------------------------------------


def test_cma_es_finds_the_bottom_of_a_quadratic_in_20_dimensions() -> None:
    target = np.linspace(-1, 1, 20)
    scale = np.logspace(0, 1, 20)
    reached = [math.inf]

    def judge(points: Sequence[NDArray[np.float64]]) -> list[float]:
        losses = [float((scale * (p - target) ** 2).sum()) for p in points]
        reached.append(min(reached[-1], *losses))
        return losses

    ggl.evolve(judge, np.zeros(20), spread=0.5, population=12, rounds=700, seed=1, watch=Watch())
    assert reached[-1] < 1e-8
    assert len(reached) == 701  # no rule of the library's own ends the search


def test_the_best_so_far_never_gets_worse() -> None:
    best, path = ggl.Found(torch.zeros(1), math.inf, 0), []
    for loss in (3.0, 5.0, math.nan, 1.0, 2.0):
        best = best.or_better(torch.tensor([loss]), loss)
        path.append(best.loss)
    assert path == [3.0, 3.0, 3.0, 1.0, 1.0]
    assert float(best.z) == 1.0 and best.evaluations == 5


def _loss(view: View, attack: GGL) -> float:
    return attack(view).notes["matching_loss"]


def test_on_an_image_that_the_prior_can_draw_the_loss_falls_tenfold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held(generator(), monkeypatch)
    view, _ = harness.observe(_scene(dtype=torch.float32), QUICK)
    start, found = (QUICK if n > 1 else replace(QUICK, rounds=1) for n in (1, 30))
    assert _loss(view, found) < 0.1 * _loss(view, start)


@pytest.mark.parametrize("kind", ["clipping", "pruning"])
def test_not_adapting_hurts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search, blind to the defense, ends further from the image."""
    held(generator(), monkeypatch)
    scene = _scene(kind, torch.float32)
    view, _ = harness.observe(scene, QUICK)
    truth = scene.victims[0].images
    errors = []
    for attack in (QUICK, replace(QUICK, adapt=())):
        pixels = scene.box.denormalize(attack(view).images)
        errors.append(float((pixels - truth).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_the_baseline_descends_on_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    held(generator(), monkeypatch)
    view, _ = harness.observe(_scene(dtype=torch.float32), QUICK)
    adam = replace(QUICK, optimizer="adam", rounds=300)  # signed steps of 0.1 take their time
    assert _loss(view, adam) < 0.1 * _loss(view, replace(adam, rounds=1))


def test_more_trials_never_end_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    held(generator(), monkeypatch)
    view, _ = harness.observe(_scene(dtype=torch.float32), QUICK)
    short = replace(QUICK, rounds=3)
    assert _loss(view, replace(short, trials=2)) <= _loss(view, short)


# -- the objective -------------------------------------------------------------------------------


def test_the_kl_term_is_that_of_normals_with_the_latents_moments() -> None:
    z = torch.randn(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.stack([z[0], 2 * z[1] + 1, 0 * z[2]])
    for one, value in zip(z[:2], ggl.kl(z), strict=False):
        own = torch.distributions.Normal(one.mean(), one.std(correction=0))
        standard = torch.distributions.Normal(torch.zeros_like(one[0]), torch.ones_like(one[0]))
        expected = torch.distributions.kl_divergence(own, standard)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert float(ggl.kl(z)[2]) == pytest.approx(-0.5 * (1 + math.log(1e-10)))


def test_the_distance_is_averaged_over_tensors() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    b = {"w": torch.tensor([0.0, 0.0]), "b": torch.tensor([1.0])}
    assert float(ggl.sq_mean(a, b)) == (1 + 4 + 4) / 2


def test_the_defaults_are_the_published_ones() -> None:
    published = GGL()
    assert (published.rounds, published.population, published.kl_weight) == (500, 50, 0.1)
    assert not published.squash and published.optimizer == "cma"
    assert GGL.variants()["published"] == published
