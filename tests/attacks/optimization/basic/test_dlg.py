from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import dlg
from leakatlas.attacks.optimization.basic.dlg import DLG
from leakatlas.bench import harness
from leakatlas.blocks import descent, labels, matching
from leakatlas.blocks.watch import Watch
from leakatlas.fl import Stage, View
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage

CASE = Case({"steps": 2, "inner": 3}, LENET)

LENET = {"width": 6}
TANH = {"widths": (12,), "act": "tanh"}


def small(**changes: object) -> Stage:
    settings = {"model": "lenet", "settings": LENET, "examples": 1, "letter": "A"}
    return build_stage(**{**settings, **changes})  # type: ignore[arg-type]  # a dict of settings


def distance(view: View, x: Tensor, logits: Tensor) -> Tensor:
    return matching.squared_l2(view.replay(x, labels.soft_labels(logits)), view.update.tensors)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return small(examples=2)


@pytest.fixture(scope="module")
def view(stage: Stage) -> View:
    return harness.observe(stage, DLG())[0]


def true_point(stage: Stage) -> tuple[Tensor, Tensor]:
    client = stage.federation.clients[0]
    return client.x, 200.0 * torch.nn.functional.one_hot(client.y, stage.classes).double()


def test_distance_and_slope_vanish_at_the_truth(stage: Stage, view: View) -> None:
    x, logits = true_point(stage)
    x = x.clone().requires_grad_()
    value = distance(view, x, logits)
    (slope,) = torch.autograd.grad(value, x)
    assert float(value.detach()) < 1e-12
    assert float(slope.norm()) < 1e-8


def test_distance_is_blind_to_order_and_to_a_constant_in_the_logits(view: View) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 10, dtype=torch.float64, generator=generator)
    value = distance(view, x, y)
    torch.testing.assert_close(distance(view, x.flip(0), y.flip(0)), value, rtol=1e-10, atol=0)
    torch.testing.assert_close(distance(view, x, y + 3), value, rtol=1e-10, atol=0)
    mixed = float(distance(view, x.flip(0), y).detach())
    assert mixed != pytest.approx(float(value.detach()), rel=1e-6)


def test_slope_against_finite_differences(view: View) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 10, dtype=torch.float64, generator=generator)
    direction = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(distance(view, leaf, y), leaf)
    step = 1e-5
    numeric = (
        distance(view, x + step * direction, y) - distance(view, x - step * direction, y)
    ) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric.detach(), rtol=1e-5, atol=0)


def test_from_near_the_truth_it_converges_to_it() -> None:
    """A local test: no luck of the start is involved."""
    stage = small()
    view, _ = harness.observe(stage, DLG())
    x, logits = true_point(stage)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    g = view.update.tensors
    scale = dlg.squared_norm(g)

    def objective(variables: Mapping[str, Tensor], t: object) -> Tensor:
        del t
        return distance(view, variables["x"], logits) / scale / dlg.UNIT

    end = descent.descend(
        objective, {"x": x + 0.01 * noise}, optimizer=descent.lbfgs(line_search=True), steps=20,
        watch=Watch(), done=lambda D: float(D) < 1e-8, report_every=1,
    )  # fmt: skip
    assert float((end.best["x"] - x).square().mean()) < 1e-8


def test_image_and_label_come_back_together() -> None:
    trial = harness.run_trial(
        small(model="fc", settings=TANH), replace(DLG.exact(), steps=30, tolerance=1e-10)
    )
    assert trial.found.labels is not None
    assert torch.equal(trial.found.labels, trial.truth.labels)
    assert float((trial.images - trial.truth.images).square().mean()) < 1e-6
    assert trial.found.reads == {"rounds", "num_examples", "input_shape", "classes"}


def test_a_wrong_frozen_label_keeps_the_distance_away_from_zero() -> None:
    """Ablation: the label has to be a variable."""
    stage = small(model="fc", settings=TANH)
    view, _ = harness.observe(stage, DLG())
    _, logits = true_point(stage)
    wrong = logits.roll(1, dims=1)
    scale = dlg.squared_norm(view.update.tensors)

    def objective(variables: Mapping[str, Tensor], t: object) -> Tensor:
        del t
        return distance(view, variables["x"], wrong) / scale

    start = torch.zeros_like(stage.federation.clients[0].x)
    end = descent.descend(
        objective, {"x": start}, optimizer=descent.lbfgs(line_search=True), steps=8, watch=Watch()
    )
    assert float(end.criterion) > 1e-2


def test_one_at_a_time_moves_one_example_per_iteration(view: View) -> None:
    alone = DLG(steps=1, one_at_a_time=True, inner=3)
    joint = DLG(steps=1, inner=3)
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(2, 3, 8, 8, generator=generator).double()
    moved = [
        attack.run(view, generator=torch.Generator().manual_seed(5), watch=Watch()).images != start
        for attack in (alone, joint)
    ]
    assert moved[0].flatten(1).any(1).tolist() == [True, False]
    assert moved[1].flatten(1).any(1).tolist() == [True, True]


def test_two_examples_come_back_one_at_a_time() -> None:
    stage = small(examples=2, model="fc", settings=TANH)
    attack = replace(DLG.exact(), steps=40, one_at_a_time=True, tolerance=1e-3)
    trial = harness.run_trial(stage, attack)
    errors = (trial.images[:, None] - trial.truth.images[None]).square().mean(dim=(2, 3, 4))
    assert float(errors.min(0).values.max()) < 1e-2
    assert trial.found.labels is not None
    assert sorted(trial.found.labels.tolist()) == sorted(trial.truth.labels.tolist())


def test_more_restarts_never_fit_worse() -> None:
    attack = DLG(steps=1, inner=4)
    view, _ = harness.observe(small(), attack)
    one = attack(view, seed=2).notes["relative_distance"]
    four = replace(attack, restarts=4)(view, seed=2)
    assert four.notes["relative_distance"] <= one
    assert four.notes["restarts"] == 4


def test_restarts_end_once_the_update_is_explained() -> None:
    attack = replace(DLG.exact(restarts=50), tolerance=0.9, steps=10, inner=2)
    assert harness.run_trial(small(), attack).found.notes["restarts"] < 50


def test_a_zero_update_is_a_failure_that_says_so(view: View) -> None:
    seen = view.rounds[-1]
    assert seen.update is not None
    silent = seen.update.with_tensors({n: 0 * t for n, t in seen.update.tensors.items()})
    found = DLG()(view.with_rounds([replace(seen, update=silent)], {}))
    assert found.status == "failed"
    assert "zero" in found.reason


def test_scatter_and_gather_are_inverse() -> None:
    x, y = torch.rand(3, 1, 2, 2), torch.rand(3, 4)
    again = dlg.gather(dlg.scatter(x, y), 3)
    assert torch.equal(again[0], x)
    assert torch.equal(again[1], y)
