"""What a call costs: time, and the memory that torch allocates for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Allocated(NamedTuple):
    """Bytes that torch allocates during a call.

    Args:
        total: All of them added up.
        most: The most that lay there at once, on top of what was there before; what the call
            returns counts.
    """

    total: int
    most: int


def allocated(call: Callable[[], object]) -> Allocated:
    """The memory of a call on the CPU; the system's own peak would hide what is used again."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = watched.profiler.kineto_results.events()
    total, alive, most = 0, 0, 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        total, alive = total + max(0, size), alive + size
        most = max(most, alive)
    return Allocated(total, most)


def least(
    call: Callable[[], object],
    times: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Least time of a few calls, in seconds of a clock."""
    spent = []
    for _ in range(times):
        begun = clock()
        call()
        spent.append(clock() - begun)
    return min(spent)
