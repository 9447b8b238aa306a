"""The seven columns of the threat model table, as a set."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from leakatlas.errors import UnknownName


class Knowledge(enum.Flag):
    """What an adversary may hold; a threat model is a union of these."""

    UPDATES = enum.auto()
    """The shared model, the update at the adversary's vantage, the example count sent with it."""
    BASIC = enum.auto()
    """The pixel space: normalisation and bounds of the inputs (a :class:`~leakatlas.data.Box`)."""
    TRAINING = enum.auto()
    """Local optimizer, learning rate, epochs, batch size, and the defenses in force."""
    SURROGATE = enum.auto()
    """Public data from the same population as the client's."""
    DISTRIBUTION = enum.auto()
    """Statistics of the client's own data: class frequencies, per-pixel mean and spread."""
    MANIPULATION = enum.auto()
    """Changing the model before the client trains on it."""
    SELECTION = enum.auto()
    """Choosing which clients take part in a round, and adding devices of its own."""

    @classmethod
    def from_names(cls, names: Iterable[str]) -> Knowledge:
        """The union of members given by their lower-case names.

        Raises:
            UnknownName: If a name is no member.
        """
        known = {member.name.lower(): member for member in cls if member.name}
        total = cls(0)
        for name in names:
            if name.lower() not in known:
                raise UnknownName("knowledge", name, known)
            total |= known[name.lower()]
        return total

    def names(self) -> tuple[str, ...]:
        """The members as lower-case names, in the table's order."""
        return tuple(member.name.lower() for member in self if member.name)
