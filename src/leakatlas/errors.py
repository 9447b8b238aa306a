"""Every error that LeakAtlas raises on purpose.

::

    LeakAtlasError
    ├── InvalidParameter    (ValueError)      a setting is outside its range
    ├── InvalidInput        (ValueError)      data, weights, a file or an update is unusable
    ├── UnknownName         (LookupError)     no such attack, defense, letter, model, data set
    ├── NotGranted          (AttributeError)  the adversary read what it does not hold
    ├── UnsupportedModel    (TypeError)       this method cannot work on this model
    ├── IncompatibleDefenses (ValueError)     defenses that break each other's guarantee
    ├── ProtocolError       (RuntimeError)    a round cannot be completed (dropouts, refusal)
    ├── Undecided           (RuntimeError)    too little ran to answer what was asked
    ├── AttackCrashed       (RuntimeError)    the process of an attack ended, or was ended
    ├── Unavailable         (RuntimeError)    an optional asset or package is not on this machine
    └── CatalogueError      (ValueError)      a row of the published tables is malformed

Messages say who, what was expected, what came instead, and the way out. They may quote what a
stranger wrote: unprintable characters are shown as escapes, and no message is longer than
:data:`LONGEST`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

LONGEST = 4_000
"""Characters of a message; a file of megabytes must not come back as its own error."""


class LeakAtlasError(Exception):
    """The root of the tree; catch it to catch everything raised on purpose."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders, and some take more than a message to be made.
        return _again, (type(self), str(self))

    @classmethod
    def _saying(cls, message: str) -> Self:
        error = cls.__new__(cls, message)
        LeakAtlasError.__init__(error, message)
        return error


def _again(kind: type[LeakAtlasError], message: str) -> LeakAtlasError:
    return kind._saying(message)


def printable(text: str) -> str:
    """``text`` without control characters and lone surrogates, cut to :data:`LONGEST`."""
    over = len(text) - LONGEST
    if over > 0:
        text = f"{text[:LONGEST]}... ({over:,} more characters)"
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80
        self.maxlong = 40

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write whole numbers of more than 4,300 digits.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else "a huge number"


def shown(value: object) -> str:
    """A stranger's value as a message quotes it: one short line, whatever it is.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    text = " ".join(_Short().repr(value).split())
    return text if len(text) <= 160 else f"{text[:157]}..."


class InvalidParameter(LeakAtlasError, ValueError):
    """A parameter of an attack, defense or protocol is outside its range."""


class InvalidInput(LeakAtlasError, ValueError):
    """Data from outside (tensors, weights, files, YAML) cannot be used as it is."""


class UnknownName(LeakAtlasError, LookupError):
    """A name that no registry knows.

    Args:
        kind: What was looked up ("attack", "defense", "threat model").
        name: The name that was asked for.
        known: All names that exist.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(known)
        # A name of a megabyte is compared by its beginning.
        asked = name[:80].lower() if isinstance(name, str) else ""
        close = difflib.get_close_matches(asked, known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        super().__init__(f"Unknown {kind} {shown(name)}. {hint}Known: {', '.join(known)}.")


class NotGranted(LeakAtlasError, AttributeError):
    """The adversary asked for something its threat model, vantage and grants do not give."""


class UnsupportedModel(LeakAtlasError, TypeError):
    """The method needs a property that this model does not have."""


class IncompatibleDefenses(LeakAtlasError, ValueError):
    """Two defenses, or a defense and a protocol, that must not be composed."""


class ProtocolError(LeakAtlasError, RuntimeError):
    """A federated round cannot be completed: too few survivors, a client that refused."""


class Undecided(LeakAtlasError, RuntimeError):
    """Too little ran to answer what was asked; silence is not an all-clear."""


class AttackCrashed(LeakAtlasError, RuntimeError):
    """The process in which an attack ran ended before it had answered, or was ended."""


class Unavailable(LeakAtlasError, RuntimeError):
    """What a run needs is not at hand: an optional package, a weight file, a data set, or time."""


@contextmanager
def needing(purpose: str, install: str = "") -> Iterator[None]:
    """Around the import of a package that only some uses need.

    Args:
        purpose: What needs it, for the message.
        install: What ``pip install`` takes to get it; its own name if left out.

    Raises:
        Unavailable: If the package is not installed, with the command that gets it.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        package = (problem.name or "").partition(".")[0]
        if package in ("", "leakatlas"):
            raise
        raise Unavailable(
            f"{purpose[:1].upper()}{purpose[1:]} needs {package}, which is not installed: "
            f"pip install '{install or package}'"
        ) from None


class CatalogueError(LeakAtlasError, ValueError):
    """A row of the catalogue is malformed or contradicts another row."""


class EndedAtOnce(SystemExit):
    """The code under audit called ``os._exit``, which no command lets end its process."""
