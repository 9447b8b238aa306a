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
"""Iterations that are timed, after two runs of one."""

SLOW = 0.5
"""Seconds of a run of one iteration from which no longer one is timed: what it sets up matters
little."""

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

    def timed(iterations: int) -> tuple[float, int]:
        probe = attack.lasting(iterations)
        quiet = Watch(parent=watch, conduct=Conduct(execution="eager"))
        begun = time.perf_counter()
        run(probe, view, seed, quiet)
        return time.perf_counter() - begun, probe.length or 1

    first, _ = timed(1)
    one, fewer = timed(1)  # once more, now that all it needs is loaded
    one = min(first, one)
    found = Pace(0.0, one / fewer)
    if one < SLOW:
        several, more = timed(PROBE)
        each = max((several - one) / max(more - fewer, 1), several / more / 10)
        found = Pace(max(several - more * each, 0.0), each)
    view.forget_reads()
    return Pace(found.overhead, max(found.iteration, 1e-6))


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
