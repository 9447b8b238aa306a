"""What lint's checks alarm on is measured by the bench."""

from leakatlas.bench.detectors import measure

__all__ = ["measure"]
