"""Who is told about an audit's progress."""

from __future__ import annotations

from typing import Protocol

from leakatlas.report import Run


class Listener(Protocol):
    """What shows an audit's progress to people."""

    def begin(self, total: int) -> None:
        """The number of planned runs is known."""

    def run(self, name: str, fraction: float, note: str = "") -> None:
        """A run is this far; ``note`` says criterion, speed and time to come."""

    def done(self, run: Run) -> None:
        """A run has ended."""


class Silent:
    """A listener that shows nothing."""

    def begin(self, total: int) -> None:
        """Ignore."""

    def run(self, name: str, fraction: float, note: str = "") -> None:
        """Ignore."""

    def done(self, run: Run) -> None:
        """Ignore."""
