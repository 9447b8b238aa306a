"""When this process began, which is when whoever typed the command began to wait."""

from __future__ import annotations

import os
import time
from pathlib import Path

STARTED = 19
"""Place of a process's start among the figures of ``/proc/self/stat`` (proc(5)), after its name."""


def began() -> float:
    """The start of this process, by ``time.perf_counter``; now, where the system does not tell."""
    now = time.perf_counter()
    try:
        figures = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(figures[STARTED]) / os.sysconf("SC_CLK_TCK")
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return now
