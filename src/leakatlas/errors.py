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
    ├── Unavailable         (RuntimeError)    an optional asset or package is not on this machine
    └── CatalogueError      (ValueError)      a row of the published tables is malformed

Messages say who, what was expected, what came instead, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LeakAtlasError(Exception):
    """The root of the tree; catch it to catch everything raised on purpose."""


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
        close = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        super().__init__(f"Unknown {kind} {name!r}. {hint}Known: {', '.join(known)}.")


class NotGranted(LeakAtlasError, AttributeError):
    """The adversary asked for something its threat model, vantage and grants do not give."""


class UnsupportedModel(LeakAtlasError, TypeError):
    """The method needs a property that this model does not have."""


class IncompatibleDefenses(LeakAtlasError, ValueError):
    """Two defenses, or a defense and a protocol, that must not be composed."""


class ProtocolError(LeakAtlasError, RuntimeError):
    """A federated round cannot be completed: too few survivors, a client that refused."""


class Unavailable(LeakAtlasError, RuntimeError):
    """An optional package, weight file or data set is not on this machine."""


class CatalogueError(LeakAtlasError, ValueError):
    """A row of the catalogue is malformed or contradicts another row."""
