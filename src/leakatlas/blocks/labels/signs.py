"""Rules that read signs: iDLG for one sample, column minima for several distinct ones.

References:
    Zhao, Mopuri and Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020.
    Yin, Mallya, Vahdat, Alvarez, Kautz and Molchanov, "See through Gradients: Image Batch Recovery
    via GradInversion", CVPR 2021.

Departures: iDLG's paper looks for the row whose inner product with every other row is not positive;
its released code takes the row of least sum. Both are here beside the bias form, which is the
default where the head has a bias because it alone needs no sign of the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from leakatlas.blocks.labels.head import Head
from leakatlas.errors import InvalidInput, InvalidParameter


def idlg_bias(bias_grad: Tensor) -> Tensor:
    """``argmin_c g_c``, a scalar: exact for B = 1, any features, smoothed labels included."""
    return bias_grad.argmin()


def idlg_sum(weight_grad: Tensor) -> Tensor:
    """``argmin_c sum_j G_cj``: exact for B = 1 and features with a positive sum."""
    return weight_grad.sum(dim=1).argmin()


def idlg_paper(weight_grad: Tensor) -> Tensor:
    """The row whose inner product with every other row is not positive (iDLG, Eq. 4).

    For B = 1 all rows are multiples of one feature vector, so this holds whatever its signs. If
    no row qualifies (B > 1) or several do (two classes), the row with the smallest largest
    product wins, ties by the smaller sum.
    """
    products = weight_grad.double() @ weight_grad.double().T
    products.fill_diagonal_(-torch.inf)
    largest = products.max(dim=1).values
    candidates = (largest <= largest.min()).nonzero().flatten()
    return candidates[weight_grad.double().sum(dim=1)[candidates].argmin()]


def idlg(
    gradients: Mapping[str, Tensor],
    head: Head,
    *,
    rule: Literal["auto", "bias", "sum", "paper"] = "auto",
) -> Tensor:
    """The label of a single sample, ``(1,)`` int64.

    Args:
        gradients: Gradients by parameter name.
        head: The classification head.
        rule: ``"bias"`` reads the bias gradient, ``"sum"`` and ``"paper"`` the weight gradient;
            ``"auto"`` is ``"bias"`` where there is one, else ``"sum"``.
    """
    if rule == "auto":
        rule = "sum" if head.bias_name is None else "bias"
    if rule == "bias":
        return idlg_bias(head.bias_grad(gradients)).reshape(1)
    if rule == "sum":
        return idlg_sum(head.weight_grad(gradients)).reshape(1)
    if rule == "paper":
        return idlg_paper(head.weight_grad(gradients)).reshape(1)
    raise InvalidParameter(f"idlg(rule={rule!r}): expected 'auto', 'bias', 'sum' or 'paper'.")


def column_minima(weight_grad: Tensor) -> Tensor:
    """``min_j G_cj`` for each class, ``(K,)``.

    With non-negative features a negative minimum proves that the class is present.
    """
    return weight_grad.min(dim=1).values


def column_min(gradients: Mapping[str, Tensor], head: Head, batch_size: int) -> Tensor:
    """The B classes of smallest column minimum, ``(B,)`` distinct labels, surest first.

    GradInversion's rule. It cannot return a repeated label: use a counting rule where repeats are
    possible.

    Raises:
        InvalidInput: If the batch is larger than the number of classes.
    """
    if not 0 < batch_size <= head.classes:
        raise InvalidInput(
            f"column_min: returns distinct labels, so batch_size must be 1..{head.classes} (the "
            f"classes), got {batch_size}; use a counting rule (uniform_counts, llg, ilrg)."
        )
    order = column_minima(head.weight_grad(gradients)).argsort(stable=True)
    return order[:batch_size]


def column_min_set(gradients: Mapping[str, Tensor], head: Head) -> Tensor:
    """Which classes have a negative column minimum, ``(K,)`` boolean.

    No false positives with non-negative features; a class may be missed when no feature is
    dominated by its samples.
    """
    return column_minima(head.weight_grad(gradients)) < 0


def sum_sign_set(gradients: Mapping[str, Tensor], head: Head) -> Tensor:
    """Which classes have a negative row sum, ``(K,)`` boolean: the older, weaker set rule."""
    return head.weight_grad(gradients).sum(dim=1) < 0
