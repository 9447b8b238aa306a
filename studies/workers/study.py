"""The bench measures itself."""

from leakatlas.bench.overhead import measure

__all__ = ["measure"]
