"""A machine whose clock moves by what is computed on it: any load, and no waiting."""

from __future__ import annotations

import signal
from collections.abc import Callable

Load = Callable[[float], float]
"""How many times slower than idle the machine is, by the time."""


class Machine:
    """Whose clock moves by what is computed on it."""

    now = 0.0
    load: Load = staticmethod(lambda now: 1.0)
    alarm: float | None = None

    def work(self, seconds: float) -> None:
        """Compute; interrupted where an alarm was set."""
        ended = self.now + seconds * self.load(self.now)
        if self.alarm is not None and ended >= self.alarm:
            self.now, self.alarm = max(self.now, self.alarm), None
            interrupt = signal.getsignal(signal.SIGALRM)
            assert callable(interrupt)
            interrupt(signal.SIGALRM, None)
        self.now = ended

    def set_alarm(self, which: int, seconds: float, interval: float = 0.0) -> None:
        """In place of :func:`signal.setitimer`."""
        assert which == signal.ITIMER_REAL and interval == 0
        self.alarm = self.now + seconds if seconds > 0 else None


MACHINE = Machine()
