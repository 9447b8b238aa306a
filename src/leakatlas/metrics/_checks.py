"""What every image measure asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput

RANGE_TOLERANCE = 1e-6  # float32 de-normalisation overshoots [0, 1] by a few 1e-7


def images(who: str, name: str, x: Tensor, *, ranged: bool = True) -> None:
    """Raise unless ``x`` is a finite float tensor ``(N, C, H, W)``, in [0, 1] if ``ranged``."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InvalidInput(
            f"{who}: {name} must be images (N, C, H, W), got shape {tuple(x.shape)}; "
            "add the batch or channel dimension."
        )
    if not x.is_floating_point():
        raise InvalidInput(
            f"{who}: {name} must be floats in [0, 1], got {x.dtype}; divide 8-bit pixels by 255."
        )
    if x.numel() == 0:
        return
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput(
            f"{who}: {name} holds NaN or infinite pixels; drop those images, or use "
            "leakatlas.metrics.score, which counts them as failures."
        )
    if ranged:
        low, high = float(x.min()), float(x.max())
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise InvalidInput(
                f"{who}: {name} must lie in [0, 1], got [{low:.4g}, {high:.4g}]; undo the "
                "network's normalisation, then clamp(0, 1)."
            )


def pair(who: str, x_hat: Tensor, x: Tensor) -> None:
    """Raise unless both are images in [0, 1] of one shape."""
    images(who, "x_hat", x_hat)
    images(who, "x", x)
    if x_hat.shape != x.shape:
        raise InvalidInput(
            f"{who}: x_hat and x must have one shape, got {tuple(x_hat.shape)} and "
            f"{tuple(x.shape)}; assign candidates to originals first (leakatlas.metrics.assign)."
        )
