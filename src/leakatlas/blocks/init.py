"""Where a search starts: candidate batches ``(N, C, H, W)`` in model space.

Draws are made in float32 on the generator's device and then converted, so that a run in float64
starts from the same point as one in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.data import Box


def normal(shape: tuple[int, ...], *, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal noise, in the dtype and on the device of ``like``."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def uniform(
    shape: tuple[int, ...], *, generator: torch.Generator, like: Tensor, box: Box | None = None
) -> Tensor:
    """Uniform noise over the valid pixels of ``box``, or over [0, 1] without one."""
    drawn = torch.rand(shape, generator=generator, device=generator.device).to(like)
    if box is None:
        return drawn
    low, high = box.bounds(drawn)
    return low + (high - low) * drawn


def grey(shape: tuple[int, ...], *, like: Tensor, box: Box | None = None) -> Tensor:
    """The middle of the valid pixels, or 0 without a box."""
    blank = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if box is None:
        return blank
    low, high = box.bounds(blank)
    return blank + (low + high) / 2
