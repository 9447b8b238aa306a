"""What an iteration costs is measured by the bench."""

from leakatlas.bench.steps import measure

__all__ = ["measure"]
