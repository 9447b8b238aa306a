"""What is refused because of its size, in one place, and how much memory there is to refuse by.

A limit on bytes is a property of the kind of file; a limit on memory is arithmetic on what this
machine has. Nothing here depends on what else the machine is doing, so that the same input has
the same answer every day.
"""

from __future__ import annotations

import os
from pathlib import Path

from leakatlas.errors import InvalidParameter

MIB = 2**20
CONFIGURATION = 256 * 1024
"""Bytes of a YAML file; a long study has ten thousand."""
ROWS = 16 * MIB
"""Bytes of a TOML file of the catalogue, which has one."""
DESCRIPTION = 64 * MIB
"""Bytes of a JSON file that describes a view, a result or a run."""
REPORT = 256 * MIB
"""Bytes of a report, which holds pictures."""
PICTURE = 256 * MIB
"""Bytes of one encoded image."""
PIXELS = 64_000_000
"""Pixels of one image; above it, a decompression bomb is likelier than a photo."""
NODES = 20_000
"""Values in a YAML file, aliases counted as often as they are used."""
DEPTH = 32
"""Levels of nesting in a YAML file."""
WHOLE = 2**63
"""Whole numbers in files are below it: no count, seed or size needs more than 64 bits."""

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory() -> int:
    """Bytes of memory that this machine, or the container on it, has."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        total = 16 * 2**30  # a system that does not say; a usual laptop
    for path in _CGROUPS:
        try:
            total = min(total, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return total


def require_memory(who: str, needed: float, arithmetic: str, *, way_out: str = "") -> None:
    """Refuse what cannot fit.

    Args:
        who: Who asks, such as "model 'fc'".
        needed: Bytes.
        arithmetic: How they come about, such as "1,000,000,000 classes x 128 units x 4 bytes".
        way_out: A sentence for the end of the message.

    Raises:
        InvalidParameter: If this machine has less.
    """
    held = memory()
    if needed > held:
        raise InvalidParameter(
            f"{who} needs {size(needed)} of memory ({arithmetic}); this machine has {size(held)}."
            + (f" {way_out}" if way_out else "")
        )


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3_200_000_000)
    '3.2 GB'
    """
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
