from __future__ import annotations

import itertools

import pytest

from leakatlas.blocks import watch as module
from leakatlas.blocks.watch import Watch


class _Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_without_a_budget_every_step_is_taken() -> None:
    watch = Watch()
    steps = list(watch.steps(4))
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert [s.progress for s in steps] == [0.0, 0.25, 0.5, 0.75]
    assert not watch.cut_short and watch.remaining() is None


def test_a_budget_ends_the_loop_and_the_schedule_still_completes(clock: _Clock) -> None:
    watch = Watch(10.0)
    seen = []
    for step in watch.steps(1000):
        seen.append(step.progress)
        clock.now += 1.0
    assert seen == pytest.approx([i / 10 for i in range(10)])
    assert watch.cut_short


def test_progress_never_falls_behind_the_steps(clock: _Clock) -> None:
    watch = Watch(100.0)
    seen = []
    for step in watch.steps(4):
        seen.append(step.progress)
        clock.now += 1.0
    assert seen == [0.0, 0.25, 0.5, 0.75] and not watch.cut_short


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_an_empty_budget_still_takes_one_step(seconds: float) -> None:
    watch = Watch(seconds)
    assert [s.index for s in watch.steps(5)] == [0]
    assert watch.cut_short


def test_a_single_step_within_the_budget_is_not_cut_short() -> None:
    watch = Watch(60.0)
    assert len(list(watch.steps(1))) == 1
    assert not watch.cut_short


def test_stop_ends_the_running_loop_at_its_next_step() -> None:
    watch = Watch()
    taken = []
    for step in watch.steps(100):
        taken.append(step.index)
        if step.index == 2:
            watch.stop()
    assert taken == [0, 1, 2] and watch.cut_short


def test_shares_divide_what_is_left_evenly(clock: _Clock) -> None:
    watch = Watch(12.0)
    allowances = []
    for part in watch.share(3):
        left = part.remaining()
        assert left is not None
        allowances.append(left)
        clock.now += 2.0  # each part uses less than its share; the rest goes to the others
    assert allowances == pytest.approx([4.0, 5.0, 8.0])
    assert not watch.cut_short


def test_a_part_that_overruns_shortens_the_others_and_the_last_may_be_dropped(
    clock: _Clock,
) -> None:
    watch = Watch(10.0)
    parts = 0
    for _ in watch.share(4):
        parts += 1
        clock.now += 6.0
    assert parts == 2 and watch.cut_short


def test_a_part_that_is_cut_short_tells_its_parents(clock: _Clock) -> None:
    watch = Watch(4.0)
    outer = next(iter(watch.share(1)))
    inner = next(iter(outer.share(2)))
    for _ in inner.steps(100):
        clock.now += 1.0
    assert inner.cut_short and outer.cut_short and watch.cut_short


def test_stopping_the_whole_stops_every_part() -> None:
    watch = Watch()
    counts: list[int] = []
    for part in watch.share(5):
        taken = 0
        for step in part.steps(10):
            taken += 1
            if len(counts) == 1 and step.index == 3:
                watch.stop()
        counts.append(taken)
    assert counts == [10, 4] and watch.cut_short


def test_the_listener_hears_rising_fractions_and_the_note(clock: _Clock) -> None:
    heard: list[tuple[float, str]] = []
    watch = Watch(listen=lambda fraction, note: heard.append((fraction, note)))
    for part in watch.share(2):
        part.note = "matching"
        for _ in part.steps(10):
            clock.now += 0.3
    fractions = [fraction for fraction, _ in heard]
    assert len(heard) > 10 and {note for _, note in heard} == {"matching"}
    assert all(a < b for a, b in itertools.pairwise(fractions))
    assert 0.0 < fractions[0] < 0.5 < fractions[-1] < 1.0


def test_a_fast_loop_does_not_drown_the_listener(clock: _Clock) -> None:
    heard: list[float] = []
    watch = Watch(listen=lambda fraction, note: heard.append(fraction))
    for _ in watch.steps(1000):
        clock.now += 0.001
    assert len(heard) <= 4


def test_no_steps_means_no_steps() -> None:
    assert list(Watch().steps(0)) == []


# -- schedules that stretch ------------------------------------------------------------------------


def _made(watch: Watch, clock: _Clock, total: int, *paces: float) -> list[float]:
    """Progress at each iteration; iteration i takes ``paces[i]`` seconds, the last one's on."""
    seen = []
    for step in watch.steps(total, stretches=True):
        seen.append(step.progress)
        clock.now += paces[min(step.index, len(paces) - 1)]
    return seen


def test_what_does_not_fit_is_planned_after_the_first_iterations(clock: _Clock) -> None:
    watch = Watch(100.0)
    seen = _made(watch, clock, 1000, 1.0)
    assert len(seen) == 85 and watch.planned == (85, 1000) and not watch.cut_short
    assert seen[3:] == pytest.approx([i / 85 for i in range(3, 85)])  # the whole schedule


def test_what_fits_is_not_planned_shorter(clock: _Clock) -> None:
    watch = Watch(100.0)
    assert len(_made(watch, clock, 80, 1.0)) == 80
    assert watch.planned is None and not watch.cut_short


@pytest.mark.parametrize(("slow", "cut"), [(1.3, False), (4.0, True)])
def test_a_machine_that_slows_down_hurries_the_schedule(
    clock: _Clock, slow: float, cut: bool
) -> None:
    """Beyond twice as slow, too little of the plan is left to speak of the method."""
    watch = Watch(100.0)
    seen = _made(watch, clock, 1000, 1.0, 1.0, 1.0, slow)
    assert watch.cut_short is cut
    assert seen[-1] > 0.95  # to the end of its schedule either way


def test_too_few_iterations_are_no_try(clock: _Clock) -> None:
    watch = Watch(10.0)
    _made(watch, clock, 1000, 1.0)
    assert watch.cut_short
    few = Watch(10.0)
    assert len(_made(few, clock, 5, 1.0)) == 5 and not few.cut_short


def test_a_search_is_cut_where_a_schedule_is_stretched(clock: _Clock) -> None:
    watch = Watch(100.0)
    for _ in watch.steps(1000):
        clock.now += 1.0
    assert watch.cut_short and watch.planned is None


def test_a_deadline_holds_for_all_below(clock: _Clock) -> None:
    whole = Watch(10.0)
    part = Watch(100.0, parent=Watch(parent=whole))
    assert part.remaining() == pytest.approx(10.0)
    clock.now += 8.0
    again = Watch(5.0, parent=whole).again()
    assert again.remaining() == pytest.approx(2.0)
    own = Watch(5.0, parent=Watch(50.0))
    clock.now += 4.0
    assert own.remaining() == pytest.approx(1.0)
    assert own.again().remaining() == pytest.approx(5.0)  # its own budget once more
    assert whole.remaining() == pytest.approx(-2.0)


def test_what_was_planned_shorter_is_known_above(clock: _Clock) -> None:
    whole = Watch(100.0)
    _made(Watch(parent=whole), clock, 1000, 1.0)
    assert whole.planned == (85, 1000) and whole.again().planned == (85, 1000)
