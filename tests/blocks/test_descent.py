from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import descent
from leakatlas.blocks.descent import Value, Variables
from leakatlas.blocks.watch import Step, Watch
from leakatlas.data import Box

TARGET = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
START = {"x": torch.zeros(3, dtype=torch.float64)}


def bowl(variables: Variables, step: Step) -> Tensor:
    del step
    return (variables["x"] - TARGET).square().sum()


def test_adam_finds_the_bottom_of_a_bowl() -> None:
    end = descent.descend(
        bowl, START, optimizer=descent.adam(0.1), steps=500, watch=Watch(),
        schedule=descent.cosine_decay(),
    )  # fmt: skip
    torch.testing.assert_close(end.best["x"], TARGET, rtol=0, atol=1e-3)
    assert end.steps == 500
    assert bool(end.alive)


def test_gradient_descent_is_the_closed_form() -> None:
    lr, steps = 0.05, 30
    end = descent.descend(bowl, START, optimizer=descent.sgd(lr), steps=steps, watch=Watch())
    expected = TARGET * (1 - (1 - 2 * lr) ** steps)
    torch.testing.assert_close(end.last["x"], expected, rtol=1e-12, atol=0)


def test_lbfgs_solves_an_ill_conditioned_quadratic_to_machine_precision() -> None:
    scales = torch.logspace(0, -4, 8, dtype=torch.float64)

    def valley(variables: Variables, step: Step) -> Tensor:
        del step
        return (scales * (variables["x"] - 1).square()).sum()

    start = {"x": torch.zeros(8, dtype=torch.float64)}
    end = descent.descend(
        valley, start, optimizer=descent.lbfgs(line_search=True), steps=20, watch=Watch()
    )
    assert float(end.criterion) < 1e-20


def test_the_start_is_not_changed() -> None:
    start = {"x": torch.zeros(3, dtype=torch.float64)}
    descent.descend(bowl, start, optimizer=descent.adam(0.1), steps=3, watch=Watch())
    assert not bool(start["x"].any())
    assert not start["x"].requires_grad


def test_the_best_iterate_is_kept_by_the_criterion_not_the_total() -> None:
    """The total drives x upwards; the criterion is smallest when x passes 1."""

    def objective(variables: Variables, step: Step) -> Value:
        del step
        x = variables["x"]
        return Value(-x.sum(), (x.detach().sum() - 1).abs())

    start = {"x": torch.zeros(1, dtype=torch.float64)}
    end = descent.descend(
        objective, start, optimizer=descent.sgd(0.125), steps=20, watch=Watch(), report_every=1
    )
    assert float(end.best["x"]) == 1.0
    assert float(end.last["x"]) == 2.5
    assert float(end.criterion) == 0.0
    assert bool((end.trace.diff() <= 0).all())


def test_the_last_iterate_is_offered_too() -> None:
    end = descent.descend(bowl, START, optimizer=descent.sgd(0.5), steps=1, watch=Watch())
    assert torch.equal(end.best["x"], TARGET)
    assert float(end.criterion) == 0


def test_each_candidate_keeps_its_own_best_and_a_broken_one_leaves_the_others_alone() -> None:
    """Eight candidates; the fourth turns NaN at step 5."""

    def objective(variables: Variables, step: Step) -> Value:
        each = (variables["x"] - TARGET).square().sum(1)
        if step.index >= 5:
            poison = torch.zeros(len(each), dtype=each.dtype)
            poison[3] = math.nan
            each = each + poison * variables["x"].sum(1)
        return Value(each.sum(), each)

    generator = torch.Generator().manual_seed(0)
    start = {"x": torch.randn(8, 3, dtype=torch.float64, generator=generator)}
    lr, steps = 0.05, 40
    end = descent.descend(objective, start, optimizer=descent.sgd(lr), steps=steps, watch=Watch())
    assert end.alive.tolist() == [True, True, True, False, True, True, True, True]
    expected = TARGET + (start["x"] - TARGET) * (1 - 2 * lr) ** steps
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(end.last["x"][others], expected[others], rtol=1e-10, atol=1e-14)
    halted = TARGET + (start["x"][3] - TARGET) * (1 - 2 * lr) ** 4
    assert float((end.best["x"][3] - halted).abs().max()) < 1e-12
    assert bool(torch.isfinite(end.criterion).all())


def test_a_candidate_thrown_to_infinity_by_its_step_is_halted_at_its_best() -> None:
    def cliff(variables: Variables, step: Step) -> Value:
        x = variables["x"]
        each = x.sum(1) * 1e308 if step.index == 3 else (x - 1).square().sum(1) * 1e-12
        return Value(each.sum(), (x.detach() - 1).square().sum(1))

    start = {"x": torch.tensor([[0.0], [0.5]], dtype=torch.float64)}
    end = descent.descend(cliff, start, optimizer=descent.sgd(1e10), steps=4, watch=Watch())
    assert bool(torch.isfinite(end.best["x"]).all())
    assert bool(torch.isfinite(end.last["x"]).all())


def test_nothing_finite_returns_the_start_and_ends_early() -> None:
    def hopeless(variables: Variables, step: Step) -> Tensor:
        del step
        return variables["x"].sum() * math.nan

    end = descent.descend(
        hopeless, START, optimizer=descent.adam(0.1), steps=1_000, watch=Watch(), report_every=10
    )
    assert math.isinf(float(end.criterion))
    assert not bool(end.alive)
    assert end.steps == 10
    assert torch.equal(end.best["x"], START["x"])


def test_done_ends_at_a_report() -> None:
    end = descent.descend(
        bowl, START, optimizer=descent.sgd(0.25), steps=1_000, watch=Watch(),
        done=lambda lowest: float(lowest) < 1e-6, report_every=5,
    )  # fmt: skip
    assert end.steps < 30
    assert end.steps % 5 == 0
    assert float(end.criterion) < 1e-6


def test_a_budget_completes_the_schedule() -> None:
    seen: list[float] = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1.0 - progress

    watch = Watch(0.2)
    end = descent.descend(
        bowl, START, optimizer=descent.adam(0.1), steps=10**7, watch=watch, schedule=schedule
    )
    assert watch.cut_short
    assert end.steps < 10**7
    assert seen[-1] > 0.5
    assert float(end.criterion) <= float(TARGET.square().sum())


def test_a_variable_that_plays_no_part_stays() -> None:
    start = {**START, "idle": torch.ones(2, dtype=torch.float64)}
    end = descent.descend(bowl, start, optimizer=descent.adam(0.1), steps=5, watch=Watch())
    assert torch.equal(end.last["idle"], start["idle"])


def test_the_first_signed_adam_step_moves_every_pixel_by_lr() -> None:
    start = {"x": torch.zeros(3, dtype=torch.float64)}
    end = descent.descend(
        bowl, start, optimizer=descent.adam(0.1), steps=1, watch=Watch(), transform=descent.signed
    )
    torch.testing.assert_close(end.last["x"], 0.1 * TARGET.sign(), rtol=1e-6, atol=0)


def test_in_turn_moves_one_group_at_a_time() -> None:
    def objective(variables: Variables, step: Step) -> Tensor:
        del step
        return sum((v - 1).square().sum() for v in variables.values()) + torch.zeros(())

    start = {"a": torch.zeros(2), "b": torch.zeros(2)}
    factory = descent.in_turn(descent.sgd(0.25), [["a"], ["b"]])
    one = descent.descend(objective, start, optimizer=factory, steps=1, watch=Watch())
    assert one.last["a"].tolist() == [0.5, 0.5]
    assert one.last["b"].tolist() == [0, 0]
    three = descent.descend(objective, start, optimizer=factory, steps=3, watch=Watch())
    assert three.last["a"].tolist() == [0.75, 0.75]
    assert three.last["b"].tolist() == [0.5, 0.5]


def test_schedules() -> None:
    falls = descent.step_decay((3 / 8, 5 / 8, 7 / 8))
    assert [falls(p) for p in (0, 0.37, 0.375, 0.7, 0.9)] == pytest.approx([1, 1, 1e-1, 1e-2, 1e-3])
    wave = descent.cosine_decay(warmup=0.1)
    assert [wave(p) for p in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_projection_holds_after_every_step() -> None:
    box = Box((0.5,), (0.25,))
    outside: list[bool] = []

    def objective(variables: Variables, step: Step) -> Tensor:
        outside.append(step.index > 0 and not box.contains(variables["x"].detach()))
        return (variables["x"] - 100).square().sum()

    end = descent.descend(
        objective, {"x": torch.zeros(1, 1, 2, 2)}, optimizer=descent.adam(1.0), steps=10,
        watch=Watch(), after=(descent.inside(box, "x"),),
    )  # fmt: skip
    assert not any(outside)
    torch.testing.assert_close(end.last["x"], torch.full((1, 1, 2, 2), 2.0))


def test_langevin_noise_has_deviation_lr_times_scale() -> None:
    lr, scale = 0.1, 0.2

    def flat(variables: Variables, step: Step) -> Tensor:
        del step
        return 0.0 * variables["x"].sum()

    end = descent.descend(
        flat, {"x": torch.zeros(100_000)}, optimizer=descent.sgd(lr), steps=1, watch=Watch(),
        after=(descent.langevin(scale, "x", generator=torch.Generator().manual_seed(0)),),
    )  # fmt: skip
    assert float(end.last["x"].std()) == pytest.approx(lr * scale, rel=0.02)
    assert abs(float(end.last["x"].mean())) < 5 * lr * scale / 100_000**0.5
