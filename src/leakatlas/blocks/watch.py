"""Time budgets and progress: how a loop learns that it should end, and says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One iteration.

    Args:
        index: From 0.
        progress: How far the schedule is, in [0, 1): by steps, or by time if the budget ends
            sooner, so that a schedule written in ``progress`` completes either way.
    """

    index: int
    progress: float


class Watch:
    """A deadline, a stop switch and a listener.

    Args:
        seconds: Time budget from now; None for no limit.
        listen: Called with ``(fraction done, note)`` a few times a second.
    """

    def __init__(
        self,
        seconds: float | None = None,
        listen: Callable[[float, str], None] | None = None,
        *,
        parent: Watch | None = None,
    ) -> None:
        self.seconds = seconds
        self.start = time.perf_counter()
        self.deadline = None if seconds is None else self.start + seconds
        self.listen = listen
        self.parent = parent
        self.note = ""
        self._stopped = False
        self.cut_short = False
        """Whether a loop ended before its last step."""

    def stop(self) -> None:
        """End every loop at its next step; what was computed is kept."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called here or above."""
        return self._stopped or (self.parent is not None and self.parent.stopped)

    def remaining(self) -> float | None:
        """Seconds left, or None without a budget."""
        return None if self.deadline is None else self.deadline - time.perf_counter()

    def again(self) -> Watch:
        """A watch with the same budget, from now; stopping this one stops it too."""
        return Watch(self.seconds, self.listen, parent=self)

    def steps(self, total: int) -> Iterator[Step]:
        """At most ``total`` iterations, at least one, within the budget."""
        begun = time.perf_counter()
        allowance = self.remaining()
        heard = begun
        for index in range(total):
            now = time.perf_counter()
            progress = index / total
            if allowance is not None:
                progress = max(progress, (now - begun) / max(allowance, 1e-9))
            if index > 0 and (progress >= 1 or self.stopped):
                self._cut()
                return
            if self.listen is not None and now - heard > 0.25:
                heard = now
                self.listen(min(progress, 1.0), self.note)
            yield Step(index, min(progress, 1.0))

    def share(self, parts: int) -> Iterator[Watch]:
        """One watch for each of ``parts`` equal pieces of work, each with its fair part."""
        for part in range(parts):
            if part > 0 and (self.stopped or (self.remaining() or 1.0) <= 0):
                self._cut()
                return
            left = self.remaining()
            listen = None
            if self.listen is not None:
                listen = _scaled(self.listen, part / parts, 1 / parts)
            yield Watch(None if left is None else left / (parts - part), listen, parent=self)

    def _cut(self) -> None:
        self.cut_short = True
        if self.parent is not None:
            self.parent._cut()


def _scaled(
    listen: Callable[[float, str], None], offset: float, width: float
) -> Callable[[float, str], None]:
    return lambda fraction, note: listen(offset + width * fraction, note)
