"""How files from outside are read: within a limit, as plain data, with errors that say where.

Whatever stands in a file, reading it returns plain values or raises
:class:`~leakatlas.errors.InvalidInput`; nothing in it is executed. Every reader of the other
rooms goes through here, or through :func:`boundary` where a library does the parsing.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leakatlas import limits
from leakatlas.errors import InvalidInput, LeakAtlasError, shown


def is_file(path: Path | str) -> bool:
    """Whether words are the path of a file; unlike pathlib, no words are too long to ask."""
    return os.path.isfile(path)


def is_folder(path: Path | str) -> bool:
    """Whether words are the path of a folder; as :func:`is_file`."""
    return os.path.isdir(path)


_CONTENT = (ValueError, OSError, RecursionError, MemoryError, OverflowError)
"""What reading can always meet: wrong values, failing files, too deep, too large."""


@contextmanager
def boundary(who: str, *more: type[Exception], way_out: str = "") -> Iterator[None]:
    """Turn what a parser raises on hostile content into one message.

    Args:
        who: What is being read, such as "The update 'a.safetensors'".
        more: What this parser raises besides :data:`_CONTENT`.
        way_out: A sentence for the end of the message.

    Raises:
        InvalidInput: In place of any of these.
    """
    expected: tuple[type[Exception], ...] = (*_CONTENT, *more)
    try:
        yield
    except LeakAtlasError:
        raise
    except expected as problem:
        reason = " ".join(str(problem).split()).rstrip(".") or type(problem).__name__
        if isinstance(problem, RecursionError):
            reason = "it is nested too deep"
        elif isinstance(problem, KeyError):
            reason = f"{reason} is missing"
        way_out = f" {way_out}" if way_out else ""
        raise InvalidInput(f"{who} cannot be read: {reason[:400]}.{way_out}") from problem


def read_bytes(path: Path | str, *, what: str, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Args:
        path: The file; pipes and devices, which may never end, are refused.
        what: For messages, such as "configuration".
        limit: In bytes.

    Raises:
        InvalidInput: If there is no such file, it is too large, or it cannot be read.
    """
    who = f"The {what} {shown(str(path))}"
    with boundary(who):
        try:
            kind = Path(path).stat().st_mode
        except FileNotFoundError:
            raise InvalidInput(f"{who} does not exist.") from None
        if not stat.S_ISREG(kind):
            got = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
            raise InvalidInput(f"{who} is {got}, expected a file.")
        with Path(path).open("rb") as file:
            content = file.read(limit + 1)
    if len(content) > limit:
        raise InvalidInput(f"{who} is larger than {limits.size(limit)}, the limit for its kind.")
    return content


def read_text(path: Path | str, *, what: str, limit: int) -> str:
    """The UTF-8 text of a file; as :func:`read_bytes`."""
    content = read_bytes(path, what=what, limit=limit)
    with boundary(f"The {what} {shown(str(path))}"):
        return content.decode("utf-8")


def read_json(path: Path | str, *, what: str, limit: int = limits.DESCRIPTION) -> Any:
    """The value in a JSON file; as :func:`read_bytes`."""
    text = read_text(path, what=what, limit=limit)
    return parse_json(text, who=f"The {what} {shown(str(path))}")


def parse_json(text: str, *, who: str) -> Any:
    """The value that JSON text describes.

    Raises:
        InvalidInput: If it is not JSON, is nested too deep, or holds a whole number of more than
            64 bits.
    """
    with boundary(who):
        return json.loads(text, parse_int=whole)


def whole(text: str) -> int:
    """A whole number in a file.

    Raises:
        ValueError: If it needs more than 64 bits.
    """
    if len(text) > 25:
        raise ValueError(f"a whole number of {len(text):,} digits is too large")
    number = int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if abs(number) >= limits.WHOLE:
        raise ValueError(f"the whole number {number} is too large")
    return number
