r"""Images of their own for every local epoch, and what does not depend on their order in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.blocks import init
from leakatlas.data import Box

RESPONSES = 96
"""Channels of the random convolution."""


def epoch_batches(N: int, B: int, E: int, copies: int) -> list[Tensor]:
    """Indices of every local step into ``copies * N`` images; epochs beyond the copies begin anew.

    Args:
        N: Examples.
        B: Batch size; the last batch of an epoch may be smaller.
        E: Epochs.
        copies: Sets of N images.
    """
    return [
        batch + N * (epoch % copies) for epoch in range(E) for batch in torch.arange(N).split(B)
    ]


def summary(
    kind: Literal["mean", "responses"], channels: int, generator: torch.Generator, like: Tensor
) -> Callable[[Tensor], Tensor]:
    """The statistic s of an epoch's images ``(N, C, H, W)``, which does not depend on their order.

    Args:
        kind: The mean image, or the largest response at every place of one random 3x3 convolution
            with scaled normal weights.
        channels: C.
        generator: Draws the convolution.
        like: Gives dtype and device.
    """
    if kind == "mean":
        return lambda x: x.mean(0)
    shape = (RESPONSES, channels, 3, 3)
    weight = init.normal(shape, generator=generator, like=like) / (9 * channels) ** 0.5
    return lambda x: F.conv2d(x, weight, padding=1).amax(0)


def order_prior(
    x: Tensor, copies: int, s: Callable[[Tensor], Tensor], distance: Literal["l2", "l1"]
) -> Tensor:
    """Mean over pairs of epochs of ``d(s(X_e), s(X_e'))``; a pair of equals counts as 0.

    Args:
        x: ``(copies * N, C, H, W)``, epoch by epoch.
        copies: Epochs with images of their own.
        s: See :func:`summary`.
        distance: Mean squares or mean absolute values.
    """
    S = torch.stack([s(part) for part in x.chunk(copies)]).flatten(1)
    difference = S[:, None] - S[None]
    each = difference.square() if distance == "l2" else difference.abs()
    return each.mean()


def merged(x: Tensor, box: Box) -> Tensor:
    """One image for each example: epochs assigned to the first one by PSNR, then averaged.

    Args:
        x: ``(E, N, C, H, W)``, model space.
        box: Gives the pixels that are compared.

    Returns:
        ``(N, C, H, W)`` inside the box.
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import

    pixels = box.denormalize(x).flatten(2).double()
    total = x[0].clone()
    for epoch, flat in zip(x[1:], pixels[1:], strict=True):
        error = torch.cdist(pixels[0], flat).square() / flat.shape[1]
        _, order = linear_sum_assignment(error.clamp(min=1e-12).log().cpu().numpy())
        total += epoch[torch.as_tensor(order, device=x.device)]
    return box.clip(total / len(x))
