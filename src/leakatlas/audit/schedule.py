"""How a budget becomes iterations: an attack's pace is measured, its schedule fits its allowance.

A run that a deadline ends half-way down its step-size schedule is worse than a shorter run that
was planned. So the first iterations are timed, the number that fits is set as the attack's own
parameter, which the recipe then names, and the schedule is stretched over it. The deadline stays
as a safety net for a machine that slows down.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from leakatlas.attacks.api import Attack
from leakatlas.audit.process import Attacker, here
from leakatlas.blocks.watch import FILL, Conduct, Watch
from leakatlas.fl import View

PROBE = 4
"""Iterations that are timed, after a run of one that loads what it needs."""

SLOW = 1.0
"""Seconds that an attack itself spends on one iteration from which no longer run is timed, unless
that takes a :data:`SMALL` part of what is left: what it sets up matters little."""

SMALL = 0.05
"""Part of the time in which it is timed all the same."""

LONGEST = 4_800
"""Iterations beyond which more time does not lengthen a schedule: the published length of most."""


@dataclass(frozen=True)
class Pace:
    """What a run costs.

    Args:
        overhead: Seconds that do not depend on its length.
        iteration: Seconds of an iteration.
    """

    overhead: float
    iteration: float

    def seconds(self, iterations: int) -> float:
        """What so many iterations take."""
        return self.overhead + iterations * self.iteration

    def fits(self, seconds: float, longest: int = LONGEST) -> int:
        """Iterations that fit into an allowance, some of it left free; 0 if not even one does.

        >>> pace = Pace(overhead=1.0, iteration=0.01)
        >>> pace.fits(10.0), pace.fits(1e6), pace.fits(1.0)
        (750, 4800, 0)
        """
        left = FILL * seconds - self.overhead
        return min(longest, max(0, int(left / self.iteration + 1e-9)))

    def slower(self, factor: float) -> Pace:
        """On a machine that became slower (or faster, below 1)."""
        return Pace(factor * self.overhead, factor * self.iteration)


def together(paces: Sequence[Pace], seconds: float) -> int:
    """The length at which runs of these paces fit into an allowance together, all equally long.

    >>> together([Pace(1.0, 0.1), Pace(0.0, 0.3)], 50.0)
    103
    """
    overhead = sum(pace.overhead for pace in paces)
    return Pace(overhead, sum(pace.iteration for pace in paces)).fits(seconds)


def pace(
    attack: Attack, view: View, *, watch: Watch, seed: int = 0, run: Attacker = here
) -> Pace | None:
    """Seconds of a run and of an iteration; None for an attack without a schedule.

    What the attack learns offline is learned before the clock starts, since it is kept.

    Raises:
        LeakAtlasError: What the attack refuses.
    """
    if attack.length is None:
        return None

    def timed(iterations: int) -> tuple[float, float, int]:
        probe = attack.lasting(iterations)
        quiet = Watch(parent=watch, conduct=Conduct(execution="eager"))
        begun = time.perf_counter()
        found = run(probe, view, seed, quiet)
        return time.perf_counter() - begun, found.seconds, probe.length or 1

    def fits(iterations: int, part: float = FILL) -> bool:
        """Whether so many more can be timed: what a deadline cuts would seem fast.

        What the first run took besides is left out: a process that starts does so once.
        """
        left = watch.remaining()
        return left is None or iterations * own / made < part * left

    whole, own, made = timed(1)
    if own >= SLOW and fits(1):  # perhaps only this once
        whole, own, made = timed(1)
    if (own < SLOW and fits(PROBE)) or fits(PROBE, SMALL):
        whole, own, made = timed(PROBE)
    view.forget_reads()
    return Pace(max(whole - own, 0.0), max(own / made, 1e-6))


def shares(gains: Sequence[float], least: float = 0.05) -> list[float]:
    """How a budget is divided among runs: by what each rehearsed above the null baseline.

    All were rehearsed with equal time, so a gain is a gain per second. What rebuilt nothing of its
    own images keeps ``least``, for a rehearsal on strangers' images may be wrong.

    Args:
        gains: dB above the null baseline, one a run.
        least: Share of the best run that the hopeless keep.

    >>> shares([10.0, 5.0, -1.0])
    [0.6451612903225806, 0.3225806451612903, 0.03225806451612903]
    """
    best = max([*gains, 0.0])
    weights = [max(least, gain / best if best > 0 else 1.0) for gain in gains]
    return [weight / sum(weights) for weight in weights]


Key = tuple[str, str]
"""A setting and an attack: jobs that differ in their target alone share what is measured."""


@dataclass(frozen=True)
class Try:
    """What one job of an attack that iterates costs here.

    Args:
        key: Its setting and attack.
        least: Seconds of a bare try.
        decent: Seconds of a run that a strong attack is sure of.
        leads: Whether it is the most promising of its setting, or stands for a letter alone.
    """

    key: Key
    least: float
    decent: float
    leads: bool = False


def reserved(tries: Sequence[Try], seconds: float) -> dict[Key, float]:
    """Seconds that each job of an attack is sure of; attacks without an entry are put off.

    First those that lead have a decent run, then the others their bare tries, the cheapest first.
    Where not even the leads fit so, their runs shrink towards bare tries, fewer iterations rather
    than none; where those do not fit either, the dearest are put off.

    Args:
        tries: One a job.
        seconds: What all may take together.

    >>> first, second = Try(("s", "first"), 1.0, 5.0, True), Try(("t", "first"), 4.0, 20.0, True)
    >>> tries = [first, second, Try(("s", "other"), 2.0, 9.0)]
    >>> reserved(tries, 40.0)
    {('s', 'first'): 5.0, ('t', 'first'): 20.0, ('s', 'other'): 2.0}
    >>> reserved(tries, 26.0)
    {('s', 'first'): 5.0, ('t', 'first'): 20.0}
    >>> reserved(tries, 15.0)
    {('s', 'first'): 3.0, ('t', 'first'): 12.0}
    >>> reserved(tries, 3.5)
    {('s', 'first'): 3.5}
    """
    leading = [one for one in tries if one.leads]
    while leading and sum(one.least for one in leading) > seconds:
        dearest = max(leading, key=lambda one: one.least).key
        leading = [one for one in leading if one.key != dearest]
    least = sum(one.least for one in leading)
    more = sum(one.decent - one.least for one in leading)
    part = min(1.0, (seconds - least) / more) if more > 0 else 1.0
    sure = {one.key: one.least + part * (one.decent - one.least) for one in leading}
    left = seconds - sum(sure[one.key] for one in leading)
    others: dict[Key, list[Try]] = {}
    for one in tries:
        if not one.leads:
            others.setdefault(one.key, []).append(one)
    for key, jobs in sorted(others.items(), key=lambda item: sum(one.least for one in item[1])):
        cost = sum(one.least for one in jobs)
        if cost <= left:
            sure[key] = jobs[0].least
            left -= cost
    return sure
