"""Independent, reproducible random streams from a seed and the name of what they are for."""

from __future__ import annotations

import hashlib

import torch


def stream(*keys: object) -> torch.Generator:
    """A CPU generator seeded by the hash of ``keys``.

    Streams with different keys are independent, so adding a client or a defense does not move
    the draws of another.
    """
    return torch.Generator().manual_seed(stream_seed(*keys))


def stream_seed(*keys: object) -> int:
    """The 63-bit seed behind :func:`stream`."""
    digest = hashlib.sha256("|".join(map(repr, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
