r"""What images look like, as penalties on a candidate batch ``(N, C, H, W)`` in model space.

Total variation has several inequivalent definitions in this field; each is here under the name of
what it sums, since a weight means nothing without its definition.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.blocks.matching import norm


def tv_mean(x: Tensor) -> Tensor:
    """Mean of ``|right - left|`` plus mean of ``|below - above|`` [Geiping et al., 2020].

    0 for a batch of constant images; a side of one pixel has no differences and adds 0.
    """
    return _mean_abs(x[..., :, 1:] - x[..., :, :-1]) + _mean_abs(x[..., 1:, :] - x[..., :-1, :])


def tv_four(x: Tensor, kind: Literal["l2", "l1"] = "l2") -> Tensor:
    """Right, down and both diagonals [Yin et al., 2020].

    Args:
        x: ``(N, C, H, W)``.
        kind: ``"l2"`` sums the four Frobenius norms of the whole batch's differences, so it grows
            with the root of the number of pixels; ``"l1"`` sums the four means of absolute values.
    """
    directions = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    measure = norm if kind == "l2" else _mean_abs
    return torch.stack([measure(d) for d in directions]).sum()


def tv_circular(x: Tensor) -> Tensor:
    """Squared differences to the right and below, the last pixel's to the first [Dimitrov, 2022].

    Summed over pixels and channels, averaged over images.
    """
    across, down = x - x.roll(-1, -1), x - x.roll(-1, -2)
    return (across.square() + down.square()).flatten(1).sum(1).mean()


def tv_padded(x: Tensor) -> Tensor:
    """Mean over all values of ``|right - here| + |below - here|``, zeros outside [breaching].

    Beyond the last column and row there are zeros, so edges are pulled towards 0.
    """
    right = F.pad(x, (0, 1))[..., 1:] - x
    below = F.pad(x, (0, 0, 0, 1))[..., 1:, :] - x
    return (right.abs() + below.abs()).mean()


def l2_norm(x: Tensor) -> Tensor:
    r"""Mean over the batch of :math:`\lVert x_i \rVert_2`."""
    return norm(x, tuple(range(1, x.dim()))).mean()


def _mean_abs(x: Tensor) -> Tensor:
    return x.abs().mean() if x.numel() else x.sum()
