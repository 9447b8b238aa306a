"""The curves of the frontier are a matter of the bench: what is dominated, and the headlines."""

from leakatlas.bench.frontier import summarise

__all__ = ["summarise"]
