"""How a budget becomes iterations: an attack's pace is measured, its schedule fits its allowance.

A run that a deadline ends half-way down its step-size schedule is worse than a shorter run that
was planned. So the first iterations are timed, the number that fits is set as the attack's own
parameter, which the recipe then names, and the schedule is stretched over it. The deadline stays
as a safety net for a machine that slows down.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from leakatlas.attacks.api import Attack
from leakatlas.audit.process import Attacker, here
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.fl import View

PROBE = 3
"""Iterations that are timed, after one that warms caches up."""

FILL = 0.85
"""Share of an allowance that is planned; the rest is for a machine that becomes slower."""

LONGEST = 4_800
"""Iterations beyond which more time does not lengthen a schedule: the published length of most."""


def pace(
    attack: Attack, view: View, *, watch: Watch, seed: int = 0, run: Attacker = here
) -> float | None:
    """Seconds of an iteration, set-up included; None for an attack without a schedule.

    What the attack learns offline is learned before the clock starts, since it is kept.

    Raises:
        LeakAtlasError: What the attack refuses.
    """
    if attack.length is None:
        return None
    seconds, iterations = 0.0, 1
    for probe in (attack.lasting(1), attack.lasting(PROBE)):
        quiet = Watch(parent=watch, conduct=Conduct(execution="eager"))
        begun = time.perf_counter()
        run(probe, view, seed, quiet)
        seconds, iterations = time.perf_counter() - begun, probe.length or 1
    view.forget_reads()
    return max(seconds / iterations, 1e-6)


def fits(seconds: float, per_iteration: float, longest: int) -> int:
    """Iterations that fit into an allowance: at least one, at most ``longest``.

    >>> fits(10.0, 0.01, 4_800), fits(10.0, 100.0, 4_800), fits(10.0, 1e-6, 4_800)
    (850, 1, 4800)
    """
    return min(longest, max(1, int(FILL * seconds / per_iteration)))


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
