"""One budget for a whole audit, and a report on disk at every moment."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from leakatlas.audit.plan import Plan
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidInput
from leakatlas.report import Report

COMPARISONS = 0.25
"""Part of the budget that goes to comparing defenses, if any are compared: attacks cannot take
it, and comparisons begin when the attacks are done."""

REPORT = 0.03
"""Part of the budget that is left for writing the report."""

OTHER_SIDE = (0.1, 0.3)
"""Least and largest part of the attacks' time that goes to the other of the two verdicts."""

WRITING = 10.0
"""Between two reports written on the way, at least so many times what the last one took."""


@dataclass(frozen=True)
class Budget:
    """When an audit's parts must end.

    Args:
        begun: From when on it counts, by ``time.perf_counter``.
        seconds: Of all parts together; None without a limit.
        compares: Whether defenses are compared after the attacks.
        other_side: Part of the attacks' time for the settings' other sides, see
            :func:`other_side`.
    """

    begun: float
    seconds: float | None
    compares: bool
    other_side: float = 0.0

    @classmethod
    def of(cls, plan: Plan, begun: float, *, other_side: float = 0.0) -> Budget:
        """What is left of the budget of a plan that was begun then.

        Its parts are parts of that: where the diagnosis took long, attacks still have theirs.
        """
        now = time.perf_counter()
        left = None if plan.seconds is None else max(plan.seconds - (now - begun), 0.0)
        return cls(now, left, bool(plan.alternatives), other_side)

    def attacks(self, stop: Watch) -> Watch:
        """The watch of the attacks on the settings as they are."""
        return self._until(self._sides * (1 - self.other_side), stop)

    def other_sides(self, stop: Watch) -> Watch:
        """The watch of the attacks on the settings' other sides, see :mod:`.realism`."""
        return self._until(self._sides, stop)

    @property
    def _sides(self) -> float:
        return 1 - REPORT - COMPARISONS * self.compares

    def comparisons(self, stop: Watch) -> Watch:
        """The watch of the comparisons: all that is left."""
        return self.rest(stop)

    def rest(self, stop: Watch) -> Watch:
        """The watch of what is left for those who lacked time."""
        return self._until(1 - REPORT, stop)

    def _until(self, share: float, stop: Watch) -> Watch:
        if self.seconds is None:
            return Watch(parent=stop)
        spent = time.perf_counter() - self.begun
        return Watch(max(share * self.seconds - spent, 0.0), parent=stop)


def other_side(attacks: int, repeated: int = 1) -> float:
    """Part of the time with which each repeated attack has what each of ``attacks`` had.

    >>> other_side(1), other_side(4), other_side(30), other_side(12, 3)
    (0.3, 0.2, 0.1, 0.2)
    """
    least, largest = OTHER_SIDE
    return min(max(least, repeated / (attacks + repeated)), largest)


class Writer:
    """Writes the report while the audit runs, so that a killed audit leaves what it has.

    Args:
        out: Folder; nothing is written if None.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self._next = 0.0

    def now_and_then(self, make: Callable[[], Report]) -> None:
        """Write, unless writing would take a noticeable part of the time."""
        if self.out is None or time.perf_counter() < self._next:
            return
        begun = time.perf_counter()
        # The last word is `finally_`'s; a draft that finds no room does not end an audit.
        with contextlib.suppress(InvalidInput):
            make().save(self.out)
        ended = time.perf_counter()
        self._next = ended + WRITING * (ended - begun)

    def finally_(self, report: Report) -> Report:
        """Write the whole report; one that could not be written says so."""
        if self.out is not None:
            try:
                report.save(self.out)
            except InvalidInput as problem:
                return replace(report, unwritten=str(problem))
        return report
