"""The end of an audit's budget, whatever it is doing then.

Loops look at the clock, and what is planned is measured first. But a network may take a minute for
one step, a machine may stall, an attack may never look. So what an audit does is interrupted soon
after the end of its budget, where that can be done: in the main thread, where there is an alarm.
What was found by then is reported, and what was not is said.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LATE = 5.0
"""Seconds after the budget's end when what still runs is interrupted: it may be ending."""

LAST = 1.0
"""Seconds that a phase has which begins later: to say what it left out."""

SOON = 1e-3
"""Seconds after which an alarm rings that somebody had set, and that was due meanwhile."""


class OutOfTime(BaseException):
    """The time is over; nobody's error, so that nobody takes it for one."""


class Deadline:
    """When an audit ends.

    Args:
        begun: From when on its budget counts, by ``time.perf_counter``.
        seconds: The budget; None without a limit.
    """

    def __init__(self, begun: float, seconds: float | None) -> None:
        self.begun = begun
        self.seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since the budget began."""
        return time.perf_counter() - self.begun

    @contextmanager
    def ends(self) -> Iterator[None]:
        """What is begun in this block ends soon after the budget, finished or not.

        Whoever enters it looks afterwards at what was not reached.
        """
        mine = threading.current_thread() is threading.main_thread()
        if self.seconds is None or not mine or not hasattr(signal, "setitimer"):
            yield
            return
        left = max(self.seconds + LATE - self.spent, LAST)
        theirs, interval = signal.getitimer(signal.ITIMER_REAL)
        if 0 < theirs <= left:  # somebody's own alarm ends this sooner
            yield
            return
        previous = signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, left)
        begun = time.perf_counter()
        try:
            yield
        except OutOfTime:
            pass
        finally:
            rest = max(theirs - (time.perf_counter() - begun), SOON) if theirs else 0.0
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, previous)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise OutOfTime
