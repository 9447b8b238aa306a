"""From updates to bounded integers and back: what a ring can add without loss."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring, Words
from leakatlas.errors import InvalidParameter

MOST_LEVELS = 2**48
"""Finer steps than this vanish in the 53 bits of the floats that they come from."""


def choose_levels(ring: Ring, clients: int, max_weight: int, asked: int | None) -> int:
    """Q: steps of the quantiser, such that no sum of weighted inputs leaves the ring.

    Args:
        ring: Where sums are taken.
        clients: n.
        max_weight: Largest integer weight of a client.
        asked: The Q that was asked for; None takes the largest one that fits.

    Raises:
        InvalidParameter: If n · max_weight · Q < R does not hold.
    """
    room = (2**ring.bits - 1) // (clients * max_weight)
    if asked is None:
        asked = min(room, MOST_LEVELS)
        asked -= asked % 2
    if not 2 <= asked <= room:
        raise InvalidParameter(
            f"SecureAggregation(levels={asked}, ring_bits={ring.bits}): the sum of {clients} "
            f"clients with weights up to {max_weight} would overflow; it needs clients * weight * "
            f"levels < 2^{ring.bits}, so at most {room} levels (and at least 2). Lower levels or "
            "max_examples, or use ring_bits=64."
        )
    return asked


def step_size(clip_range: float, levels: int) -> float:
    """Distance 2c/Q between neighbouring levels."""
    return 2.0 * clip_range / levels


def quantise(
    values: Tensor, clip_range: float, levels: int, generator: torch.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Clip to [-c, c] and round stochastically to multiples of the step; unbiased inside.

    0 stays 0: it lies on the grid, whatever is drawn.

    Args:
        values: ``(D,)`` float64.
        clip_range: c.
        levels: Q; results lie in [-Q/2, Q/2].
        generator: Of the rounding.
    """
    scaled = values.clamp(-clip_range, clip_range) / step_size(clip_range, levels)
    drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64)
    most = levels // 2
    whole = torch.floor(scaled + drawn).clamp(-most, most)
    return np.asarray(whole.to(torch.int64).numpy())


def into_ring(integers: np.ndarray[tuple[int], np.dtype[np.int64]], ring: Ring) -> Words:
    """Signed integers as ring elements."""
    return integers.astype(ring.unsigned)


def from_ring(words: Words, ring: Ring) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ring elements as the signed integers next to 0."""
    return words.view(ring.signed).astype(np.int64)


def mean_of_sum(
    total: np.ndarray[tuple[int], np.dtype[np.int64]], weight: int, step: float
) -> Tensor:
    """The weighted mean ``(D,)`` float64 behind a sum of weighted integers."""
    return torch.from_numpy(total.astype(np.float64)) * (step / weight)


def word_tensor(words: Words, ring: Ring) -> Tensor:
    """Ring elements as a torch tensor with the same bits (torch adds no unsigned words)."""
    return torch.from_numpy(words.view(ring.signed).copy())


def tensor_words(tensor: Tensor, ring: Ring) -> Words:
    """The inverse of :func:`word_tensor`."""
    words: Words = tensor.cpu().numpy().view(ring.unsigned)
    return words


def threshold_count(fraction: float, clients: int) -> int:
    """t: the fraction of the cohort, rounded up; at least one client."""
    # 2/3 of 3 must not become 3 by the last bit of the product.
    return max(1, math.ceil(fraction * clients - 1e-9))
