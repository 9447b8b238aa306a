"""GIFD: stages that continue each other, balls, and what a later stage gains."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.generative.latent import gifd
from leakatlas.attacks.generative.latent.gifd import GIFD, project_l1
from leakatlas.bench import harness
from leakatlas.blocks.watch import Step
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.errors import InvalidInput
from leakatlas.fl import Stage
from leakatlas.priors import kept
from leakatlas.priors.prior import through
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage, surrogate
from tests.priors.support import SIZE, check_stages, generator, held, prior

CASE = Case(
    {"steps": 2, "restarts": 2, "prior_steps": 3, "prior_latent": 8},
    {**LENET, "size": 8, "examples": 1},
    boxed=True,
)


def _latent(count: int = 2) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(5))


def test_the_stages_compose_to_the_generator() -> None:
    for classes in (0, 3):
        check_stages(prior(generator(classes=classes)), _latent(), torch.tensor([2, 0]))


def test_a_stage_starts_with_the_image_at_which_the_one_before_ended() -> None:
    stages = prior(generator()).stages
    h = _latent()
    for k in range(len(stages)):
        before, (h,) = through(stages[k:], h), stages[k](h)
        assert torch.allclose(through(stages[k + 1 :], h), before, atol=1e-5)


def test_a_prior_that_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = replace(prior(generator()), stages=())
    monkeypatch.setattr(kept, "decoder", lambda name: closed)
    scene = _scene()
    view, _ = harness.observe(scene, QUICK)
    with pytest.raises(InvalidInput, match="stage by stage; the prior 'held' has none"):
        QUICK(view)


# -- balls and spheres ---------------------------------------------------------------------------


def test_the_projection_stays_inside_and_is_idempotent() -> None:
    v = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radii = torch.tensor([0.5, 5.0, 1e9, math.inf], dtype=torch.float64)
    found = project_l1(v, radii)
    assert bool((found.abs().sum(1) <= radii + 1e-9).all())
    assert torch.equal(found[2:], v[2:])
    assert torch.allclose(project_l1(found, radii), found, atol=1e-12)
    assert bool((project_l1(v, torch.zeros(4)) == 0).all())


def test_the_projection_is_the_nearest_point_of_the_ball() -> None:
    """Against a general solver, in five dimensions: v = p - n, both positive, sum at most r."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        v = 2 * torch.randn(5, generator=draws, dtype=torch.float64)
        target = v.numpy()

        def apart(s: NDArray[np.float64], target: NDArray[np.float64] = target) -> float:
            return float(((s[:5] - s[5:] - target) ** 2).sum())

        minimize: Any = optimize.minimize  # its overloads know no constraint as a lambda
        solved = minimize(
            apart, np.full(10, 0.1), bounds=[(0, None)] * 10, method="SLSQP", tol=1e-14,
            constraints={"type": "ineq", "fun": lambda s: 1.5 - s.sum()},
        )  # fmt: skip
        expected = torch.from_numpy(solved.x[:5] - solved.x[5:])
        assert torch.allclose(project_l1(v[None], torch.tensor([1.5]))[0], expected, atol=1e-5)


def test_latents_stay_on_the_spheres_of_their_start() -> None:
    start = _latent(4).reshape(2, 2, 12)
    z = start + 1
    gifd.on_sphere(start)({"z": z}, {}, Step(0, 0.0))
    assert torch.allclose(z.norm(dim=2), start.norm(dim=2))
    direction = (start + 1) / (start + 1).norm(dim=2, keepdim=True)
    assert torch.allclose(z / z.norm(dim=2, keepdim=True), direction, atol=1e-6)


def test_features_move_inside_their_balls_only() -> None:
    center = torch.zeros(2, 3, 2, 2)
    h = torch.ones(2, 3, 2, 2)
    gifd.in_ball(center, torch.tensor([6.0, 100.0]))({"h": h}, {}, Step(0, 0.0))
    assert torch.allclose(h[0], torch.full((3, 2, 2), 0.5)) and bool((h[1] == 1).all())


def test_the_step_size_rises_and_falls() -> None:
    assert gifd.ramp(0.0) == 0.0
    assert gifd.ramp(0.025) == pytest.approx(0.5)
    assert gifd.ramp(0.25) == pytest.approx(1.0)
    assert gifd.ramp(0.625) == pytest.approx(0.5)
    assert gifd.ramp(1.0) == pytest.approx(0.0)


# -- what the stages gain ------------------------------------------------------------------------

QUICK = GIFD(steps=40, restarts=1, prior="held", radius=math.inf)


def _scene() -> Stage:
    return build_stage(
        model="convnet", settings={"width": 8}, size=SIZE, letter="D", examples=1,
        dtype=torch.float32, grants=frozenset({Grant.LABELS}),
    )  # fmt: skip


@functools.cache
def _found(attack: GIFD) -> tuple[Reconstruction, float]:
    with pytest.MonkeyPatch.context() as patch:
        held(generator(), patch)
        scene = _scene()
        view, _ = harness.observe(scene, attack)
        found = attack(view)
    pixels = scene.box.denormalize(found.images).clamp(0, 1)
    error = (pixels - scene.victims[0].images).square().mean()
    return found, float(-10 * error.log10())


def test_without_balls_the_distance_never_rises_from_stage_to_stage() -> None:
    notes = _found(QUICK)[0].notes
    losses = [notes[f"stage_{k}_loss"] for k in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0] and notes["matching_loss"] == losses[-1]


def test_a_real_photo_gains_from_every_opened_stage() -> None:
    """Out of the range of the generator, later domains draw what the latent cannot."""
    only = _found(replace(QUICK, stages=0))[1]
    assert _found(QUICK)[1] > only + 1


def test_balls_of_no_size_keep_the_image_of_the_latent_search() -> None:
    tiny = _found(replace(QUICK, radius=1e-12))[0]
    only = _found(replace(QUICK, stages=0))[0]
    assert torch.allclose(tiny.images, only.images, atol=1e-4)


def test_balls_hold_the_features_back() -> None:
    free, bound = _found(QUICK)[0], _found(replace(QUICK, radius=0.02))[0]
    assert free.notes["matching_loss"] < bound.notes["matching_loss"]
    assert bound.notes["matching_loss"] < bound.notes["stage_0_loss"]


def test_an_oblivious_search_differs_where_a_defense_has_a_mirror() -> None:
    for rate, equal in ((0.9, False), (0.0, True)):
        scene = build_stage(
            letter="D", examples=1, size=8, public=surrogate(8),
            defenses=(GradientPruning(rate=rate, largest_share=0.0, error_feedback=False),),
        )  # fmt: skip
        oblivious = GIFD(steps=2, restarts=1, prior_steps=3, prior_latent=8, adaptive=False)
        view, _ = harness.observe(scene, oblivious)
        known, plain = (replace(oblivious, adaptive=told)(view) for told in (True, False))
        assert torch.equal(known.images, plain.images) == equal


def test_the_defaults_are_the_published_ones() -> None:
    attack = GIFD()
    assert (attack.steps, attack.lr) == (1_000, 0.1)
    assert (attack.tv_weight, attack.norm_weight) == (1e-4, 1e-6)
    assert attack.restarts == 4
