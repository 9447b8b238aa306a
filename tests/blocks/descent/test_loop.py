from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import descent, watch
from leakatlas.blocks.descent import Value, Variables
from leakatlas.blocks.watch import Conduct, Trail, Watch
from leakatlas.data import Box
from leakatlas.errors import InvalidParameter

TARGET = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
START = {"x": torch.zeros(3, dtype=torch.float64)}


def bowl(variables: Variables, t: Tensor) -> Tensor:
    del t
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

    def valley(variables: Variables, t: Tensor) -> Tensor:
        del t
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

    def objective(variables: Variables, t: Tensor) -> Value:
        del t
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

    def poisoned(variables: Variables, t: Tensor) -> Tensor:
        value = (variables["x"] - TARGET).square().sum()
        sick = (variables["marked"].sum() > 0) & (t >= 5 / 40)
        return value * torch.where(sick, math.nan, 1.0)

    generator = torch.Generator().manual_seed(0)
    start = {
        "x": torch.randn(8, 3, dtype=torch.float64, generator=generator),
        "marked": torch.zeros(8, 1, dtype=torch.float64),
    }
    start["marked"][3] = 1
    lr, steps = 0.05, 40
    end = descent.descend(
        poisoned, start, candidates=8, optimizer=descent.sgd(lr), steps=steps, watch=Watch()
    )
    assert end.alive.tolist() == [True, True, True, False, True, True, True, True]
    expected = TARGET + (start["x"] - TARGET) * (1 - 2 * lr) ** steps
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(end.last["x"][others], expected[others], rtol=1e-10, atol=1e-14)
    halted = TARGET + (start["x"][3] - TARGET) * (1 - 2 * lr) ** 4
    assert float((end.best["x"][3] - halted).abs().max()) < 1e-12
    assert bool(torch.isfinite(end.criterion).all())


def test_a_candidate_thrown_to_infinity_by_its_step_is_halted_at_its_best() -> None:
    def cliff(variables: Variables, t: Tensor) -> Value:
        x = variables["x"].sum()
        total = torch.where(t >= 3 / 4, x * 1e308, (x - 1).square() * 1e-12)
        return Value(total, (x.detach() - 1).square())

    start = {"x": torch.tensor([[0.0], [0.5]], dtype=torch.float64)}
    end = descent.descend(
        cliff, start, candidates=2, optimizer=descent.sgd(1e10), steps=4, watch=Watch()
    )
    assert bool(torch.isfinite(end.best["x"]).all())
    assert bool(torch.isfinite(end.last["x"]).all())


def test_nothing_finite_returns_the_start_and_ends_early() -> None:
    def hopeless(variables: Variables, t: Tensor) -> Tensor:
        del t
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
    assert watch.planned is not None and watch.planned[0] < watch.planned[1] == 10**7
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


def test_a_transform_may_be_named_for_one_variable() -> None:
    def objective(variables: Variables, t: Tensor) -> Tensor:
        del t
        return sum((3 * v).sum() for v in variables.values()) + torch.zeros(())

    start = {"a": torch.zeros(2), "b": torch.zeros(2)}
    moved = descent.descend(
        objective, start, optimizer=descent.sgd(1.0), steps=1, watch=Watch(),
        transform={"a": descent.signed},
    )  # fmt: skip
    assert moved.last["a"].tolist() == [-1, -1] and moved.last["b"].tolist() == [-3, -3]
    with pytest.raises(InvalidParameter, match="Transforms are given for c; the variables are a"):
        descent.descend(
            objective, start, optimizer=descent.sgd(1.0), steps=1, watch=Watch(),
            transform={"c": descent.signed},
        )  # fmt: skip


def test_in_turn_moves_one_group_at_a_time() -> None:
    def objective(variables: Variables, t: Tensor) -> Tensor:
        del t
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

    def objective(variables: Variables, t: Tensor) -> Tensor:
        outside.append(float(t) > 0 and not box.contains(variables["x"].detach()))
        return (variables["x"] - 100).square().sum()

    end = descent.descend(
        objective, {"x": torch.zeros(1, 1, 2, 2)}, optimizer=descent.adam(1.0), steps=10,
        watch=Watch(), after=(descent.inside(box, "x"),),
    )  # fmt: skip
    assert not any(outside)
    torch.testing.assert_close(end.last["x"], torch.full((1, 1, 2, 2), 2.0))


def test_langevin_noise_has_deviation_lr_times_scale() -> None:
    lr, scale = 0.1, 0.2

    def flat(variables: Variables, t: Tensor) -> Tensor:
        del t
        return 0.0 * variables["x"].sum()

    end = descent.descend(
        flat, {"x": torch.zeros(100_000)}, optimizer=descent.sgd(lr), steps=1, watch=Watch(),
        after=(descent.langevin(scale, "x", generator=torch.Generator().manual_seed(0)),),
    )  # fmt: skip
    assert float(end.last["x"].std()) == pytest.approx(lr * scale, rel=0.02)
    assert abs(float(end.last["x"].mean())) < 5 * lr * scale / 100_000**0.5


def test_candidates_are_what_each_would_be_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    together = descent.descend(
        bowl, {"x": start}, candidates=4, optimizer=descent.adam(0.1), steps=30, watch=Watch()
    )
    for index in range(4):
        alone = descent.descend(
            bowl, {"x": start[index]}, optimizer=descent.adam(0.1), steps=30, watch=Watch()
        )
        assert torch.equal(together.last["x"][index], alone.last["x"])
        assert torch.equal(together.criterion[index], alone.criterion)
    best = int(together.criterion.argmin())
    assert torch.equal(together.chosen()["x"], together.best["x"][best])


def test_a_weight_may_be_a_function_of_t() -> None:
    """The pull towards 10 fades out along the run, so the end is that of the bowl."""

    def fading(variables: Variables, t: Tensor) -> Tensor:
        pull = (variables["x"] - 10).square().sum()
        return (variables["x"] - TARGET).square().sum() + 10 * torch.clamp(1 - 2 * t, min=0) * pull

    end = descent.descend(
        fading, START, optimizer=descent.sgd(0.02), steps=400, watch=Watch(), report_every=50
    )
    torch.testing.assert_close(end.last["x"], TARGET, rtol=0, atol=1e-2)


def test_candidates_may_share_what_they_agree_on() -> None:
    """Each is drawn to the mean of all, which is constant within a step."""

    def drawn(variables: Variables, t: Tensor) -> Tensor:
        del t
        return (variables["x"] - variables["mean"]).square().sum()

    start = torch.tensor([[0.0], [4.0]], dtype=torch.float64)
    end = descent.descend(
        drawn, {"x": start}, candidates=2, optimizer=descent.sgd(0.25), steps=1, watch=Watch(),
        shared=lambda variables, step: {"mean": variables["x"].mean(0)},
    )  # fmt: skip
    assert end.last["x"].tolist() == [[1.0], [3.0]]


def test_stages_share_a_budget_by_weight_and_the_second_starts_from_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as still:
        still.setattr("time.perf_counter", lambda: 100.0)
        shares = list(Watch(8.0).share([1, 3]))
    assert shares[0].seconds == 2.0
    parts = Watch().share([1, 3])
    first = descent.descend(bowl, START, optimizer=descent.sgd(0.1), steps=5, watch=next(parts))
    second = descent.descend(
        bowl, first.best, optimizer=descent.sgd(0.1), steps=5, watch=next(parts)
    )
    whole = descent.descend(bowl, START, optimizer=descent.sgd(0.1), steps=10, watch=Watch())
    assert torch.equal(second.last["x"], whole.last["x"])


def test_a_line_search_takes_candidates_one_by_one_and_spares_those_after_success() -> None:
    start = {"x": torch.zeros(3, 3, dtype=torch.float64)}
    factory = descent.lbfgs(line_search=True)
    end = descent.descend(
        bowl, start, candidates=3, optimizer=factory, steps=5, watch=Watch(), report_every=1,
        done=lambda D: float(D.min()) < 1e-20,
    )  # fmt: skip
    assert float(end.criterion[0]) < 1e-20
    assert end.criterion[1:].tolist() == [math.inf, math.inf]
    torch.testing.assert_close(end.chosen()["x"], TARGET)


def test_ctrl_c_returns_the_best_so_far() -> None:
    calls = 0

    def interrupted(variables: Variables, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return bowl(variables, t)

    top = Watch()
    watch = Watch(parent=top)
    end = descent.descend(interrupted, START, optimizer=descent.sgd(0.1), steps=1_000, watch=watch)
    assert end.steps == 11
    assert top.stopped and watch.cut_short
    expected = TARGET * (1 - 0.8**10)
    torch.testing.assert_close(end.best["x"], expected, rtol=1e-12, atol=0)


def test_a_budget_of_a_second_returns_something_valid() -> None:
    watch = Watch(0.05)
    end = descent.descend(bowl, START, optimizer=descent.adam(0.1), steps=10**7, watch=watch)
    assert bool(torch.isfinite(end.best["x"]).all())
    assert float(end.criterion) <= float(TARGET.square().sum())
    assert watch.planned is not None and watch.planned[1] == 10**7


@pytest.mark.parametrize(("candidates", "line_search"), [(None, False), (None, True), (2, False)])
def test_a_budget_ends_a_step_of_many_evaluations(
    candidates: int | None, line_search: bool
) -> None:
    calls = 0
    each = candidates or 1
    watch = Watch(3_600.0)

    def late(variables: Variables, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 * each:
            watch.deadline = watch.start  # from now on the budget is over
        return (variables["x"] - TARGET).square().square().sum()

    end = descent.descend(
        late, {"x": START["x"].repeat(each, 1).squeeze(0)}, candidates=candidates, steps=3,
        optimizer=descent.lbfgs(inner=100, line_search=line_search), watch=watch,
    )  # fmt: skip
    assert end.steps == 1 and watch.cut_short
    assert calls == 4 * each  # three in time, and that of the last iterate
    assert bool((end.criterion < TARGET.square().square().sum()).all())


def test_the_result_so_far_is_shown_at_every_report() -> None:
    trail = Trail()
    end = descent.descend(
        bowl, START, optimizer=descent.sgd(0.1), steps=300, report_every=10,
        watch=Watch(conduct=Conduct(trail=trail)),
    )  # fmt: skip
    # Reports 1 to 7, then 9, 11, 13, 15, 18, 21, 25 and 29 of 30.
    assert len(trail.points) == 15
    trail.end(end.best["x"])
    errors = [float((x - TARGET).norm()) for _, x in trail.points]
    assert errors == sorted(errors, reverse=True)
    assert [s for s, _ in trail.points] == sorted(s for s, _ in trail.points)


def test_of_several_candidates_the_one_of_the_lowest_criterion_is_shown() -> None:
    trail = Trail()
    starts = {"x": torch.stack([START["x"] + 5, START["x"], START["x"] - 5])}
    descent.descend(
        bowl, starts, candidates=3, optimizer=descent.sgd(1e-3), steps=1, report_every=1,
        watch=Watch(conduct=Conduct(trail=trail)),
    )  # fmt: skip
    ((_, shown),) = trail.points
    nearest = (starts["x"] - TARGET).flatten(1).norm(dim=1).argmin()
    assert torch.equal(shown, starts["x"][nearest])


def test_large_iterates_are_thinned_out_and_the_last_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_KEPT", 100)
    trail = Trail()
    for number in range(40):
        trail.add(torch.full((10,), float(number)))
    trail.end(torch.full((10,), 40.0))
    shown = [float(x[0]) for _, x in trail.points]
    assert 3 <= len(shown) <= 10 and shown == sorted(shown)
    assert (shown[0], shown[-1]) == (0.0, 40.0)


def test_a_way_of_other_shape_than_what_came_out_is_not_kept() -> None:
    trail = Trail()
    trail.add(torch.zeros(2, 3))
    trail.end(torch.zeros(1, 3))
    assert trail.points == []


def test_progress_says_criterion_rate_and_wait() -> None:
    watch = Watch(listen=lambda fraction, note: None)
    descent.descend(bowl, START, optimizer=descent.sgd(0.1), steps=50, watch=watch)
    assert "criterion" in watch.note and "it/s" in watch.note and "s left" in watch.note


@pytest.mark.parametrize("optimizer", [descent.adam(0.2), descent.lbfgs(0.5, inner=4)])
def test_a_variable_may_be_one_number_for_each_candidate(optimizer: descent.Factory) -> None:
    start = torch.tensor([0.9, -0.4, 0.1], dtype=torch.float64)

    def objective(variables: Variables, t: Tensor) -> Tensor:
        del t
        assert variables["alpha"].dim() == 0
        return (variables["alpha"] - 0.3).square()

    end = descent.descend(
        objective, {"alpha": start}, candidates=3, optimizer=optimizer, steps=60, watch=Watch()
    )
    torch.testing.assert_close(end.best["alpha"], torch.full_like(start, 0.3), atol=1e-2, rtol=0)
    assert bool(end.alive.all()) and end.chosen()["alpha"].dim() == 0


def test_one_number_that_breaks_halts_its_candidate_alone() -> None:
    def objective(variables: Variables, t: Tensor) -> Tensor:
        del t
        return (variables["alpha"] - 2).square() + 0 * variables["alpha"].log()

    end = descent.descend(
        objective, {"alpha": torch.tensor([0.5, -1.0])}, candidates=2,
        optimizer=descent.sgd(0.01), steps=30, watch=Watch(), report_every=5,
    )  # fmt: skip
    assert end.alive.tolist() == [True, False]


def test_learning_rates_go_by_the_names_of_variables() -> None:
    noise = descent.langevin(3.0, "b", generator=torch.Generator().manual_seed(0))

    def slope(variables: Variables, t: Tensor) -> Tensor:
        del t
        return variables["a"].sum() + 0 * variables["b"].sum()

    end = descent.descend(
        slope, {"a": torch.zeros(2), "b": torch.zeros(50_000)},
        optimizer=descent.sgd({"b": 0.01, "a": 0.5}), steps=1, watch=Watch(), after=(noise,),
    )  # fmt: skip
    torch.testing.assert_close(end.last["a"], torch.full((2,), -0.5))
    assert float(end.last["b"].std()) == pytest.approx(0.01 * 3.0, rel=0.02)
    with pytest.raises(InvalidParameter, match="given for a; the variables are a, b"):
        descent.descend(
            slope, {"a": torch.zeros(2), "b": torch.zeros(2)},
            optimizer=descent.adam({"a": 0.1}), steps=1, watch=Watch(),
        )  # fmt: skip


def test_a_variable_that_is_no_image_stays_between_its_bounds() -> None:
    end = descent.descend(
        lambda variables, t: variables["alpha"], {"alpha": torch.tensor([0.5, 0.9])}, candidates=2,
        optimizer=descent.sgd(0.3), steps=9, watch=Watch(),
        after=(descent.between(0.25, 1.0, "alpha"),),
    )  # fmt: skip
    assert end.last["alpha"].tolist() == [0.25, 0.25]
