"""Files that carry their own SHA-256: what fails it is discarded with a warning, never believed.

A truncated or altered intermediate result is worse than none, because what it lost looks like
something that never leaked. A sealed file is one line of hexadecimal digits and then the content.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import warnings
from pathlib import Path

MALFORMED: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    RecursionError,
    RuntimeError,
    EOFError,
    struct.error,
)
"""What reading a kept file meets whose content is not of the form in which it was kept."""


class DamagedFile(UserWarning):
    """A kept file was not what had been written; it is not used."""


def seal(file: Path, content: bytes) -> None:
    """Write ``content`` with its digest.

    Raises:
        OSError: If it cannot be written; the file is then as it was before.
    """
    write_whole(file, f"{digest(content)}\n".encode() + content)


def unseal(file: Path) -> bytes | None:
    """The content of a sealed file; None if there is none, or if it fails its digest."""
    try:
        line, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if line.decode("ascii", "replace") != digest(content):
        discard(file, "it fails its SHA-256")
        return None
    return content


def discard(file: Path, reason: str) -> None:
    """Remove a file that cannot be used, and say so.

    Args:
        file: The file.
        reason: Why, as a clause.
    """
    file.unlink(missing_ok=True)
    warnings.warn(
        f"{file} was discarded: {reason}. What it held is computed again.",
        DamagedFile,
        stacklevel=3,
    )


def digest(content: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write_whole(file: Path, content: bytes) -> None:
    """Write all or nothing: a kill, a full disk or a second writer leaves no half of a file.

    Raises:
        OSError: If it cannot be written; the file is then as it was before.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
