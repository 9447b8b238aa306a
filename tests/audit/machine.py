"""A machine whose clock moves by what is computed on it: any load, and no waiting."""

from __future__ import annotations

from collections.abc import Callable

Load = Callable[[float], float]
"""How many times slower than idle the machine is, by the time."""


class Machine:
    """Whose clock moves by what is computed on it."""

    now = 0.0
    load: Load = staticmethod(lambda now: 1.0)

    def work(self, seconds: float) -> None:
        self.now += seconds * self.load(self.now)


MACHINE = Machine()
