"""When this process began, which is when whoever typed the command began to wait."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STARTED = 19
"""Place of a process's start among the figures of ``/proc/self/stat`` (proc(5)), after its name."""


def began() -> float:
    """The start of this process, by ``time.perf_counter``.

    Now, where the system does not tell, or where another program calls the command: what that did
    before is nothing that anybody waits for here.
    """
    now = time.perf_counter()
    if not _is_ours():
        return now
    try:
        figures = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(figures[STARTED]) / os.sysconf("SC_CLK_TCK")
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return now


def _is_ours() -> bool:
    """Whether this process was started as ``leakatlas`` or ``python -m leakatlas``."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    module = Path(__file__).parents[1] / "__main__.py"
    return file is not None and (Path(file).stem == "leakatlas" or Path(file).resolve() == module)
