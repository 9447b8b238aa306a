"""Facts of the machine, read and never typed."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

import leakatlas
from leakatlas import limits

STATUS = Path("/proc/self/status")
MEMORY = Path("/proc/meminfo")


def facts(device: str = "cpu") -> dict[str, Any]:
    """What a reader must know of the machine behind a figure."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "leakatlas": leakatlas.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda") and torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def in_words(machine: dict[str, Any]) -> str:
    """One line for tables.

    Example:
        >>> in_words({"processor": "AMD EPYC", "cores": 2, "threads": 1})
        'AMD EPYC, 2 cores, 1 thread'
    """
    threads = machine.get("threads")
    parts = [
        machine.get("accelerator"),
        machine.get("processor"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        None if threads is None else f"{threads} thread{'s' * (threads != 1)}",
    ]
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def forget_peak() -> None:
    """Start a new record of this process's peak memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory() -> float | None:
    """Most memory that this process held at once since :func:`forget_peak`, in MiB."""
    return _of_status("VmHWM")


def data_memory() -> float | None:
    """Private writable memory of this process, in MiB: what ``RLIMIT_DATA`` counts."""
    return _of_status("VmData")


def available_memory() -> float | None:
    """Memory that a process could take now without the system swapping, in GiB."""
    kib = _of("MemAvailable", MEMORY)
    return None if kib is None else min(kib * 1024, limits.memory()) / 2**30


def end_first() -> None:
    """Where memory ends all the same, this process is the one that the system ends."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _of_status(name: str) -> float | None:
    kib = _of(name, STATUS)
    return None if kib is None else kib / 1024


def _of(name: str, file: Path) -> int | None:
    """A size in KiB that the system tells by name."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    size = next(sizes, None)
    return None if size is None else int(size)
