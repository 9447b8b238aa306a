"""Where in the protocol the adversary looks."""

from __future__ import annotations

import enum

from leakatlas.errors import UnknownName


class Vantage(enum.StrEnum):
    """The place at which a message is observed; defenses protect some places and not others."""

    WIRE = "wire"
    """The network between one client and the server."""
    SERVER = "server"
    """The server, before it aggregates: one update per client, if it can be decoded."""
    AGGREGATE = "aggregate"
    """The aggregate alone: what secure aggregation shows, or what the next broadcast reveals."""
    PEER = "peer"
    """Another client: the broadcast before and after, and its own contribution to the round."""

    @classmethod
    def named(cls, name: str) -> Vantage:
        """The vantage with this name.

        Raises:
            UnknownName: If there is none.
        """
        try:
            return cls(name)
        except ValueError:
            raise UnknownName("vantage", name, map(str, cls)) from None
