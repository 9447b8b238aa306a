"""Capture and guard measure themselves."""

from leakatlas.integrations.costs import measure

__all__ = ["measure"]
