"""Rules that take labels out one by one: LLG, LLG*, LLG+, E2EGI and the bias-corrected rule.

A class's row sum ``G_c`` (or bias gradient ``g_c``) is an offset plus its count times an *impact*,
the contribution of one sample of its own. Each rule guesses impact and offset, then removes one
sample at a time from the most negative class.

References:
    Wainakh, Ventola, Müßig, Keim, Cordero, Zimmer, Grube, Kersting and Mühlhäuser, "User-Level
    Label Leakage from Gradients in Federated Learning", PoPETs 2022.
    Li et al., "E2EGI: End-to-End Gradient Inversion in Federated Learning", 2022 (released code).
    Geiping et al., ``breaching``: the bias-corrected rule, that framework's default.

Departures: a batch with more negative classes than samples keeps the most negative ones (released
codes emit all and truncate a sorted list). Where a rule's impact is not negative there is nothing
to remove by; the batch is then spread evenly instead of being given to one class. The impact is
always subtracted from the class just emitted. E2EGI's code fails if no row sum is positive; LLG's
impact stands in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.blocks.labels import _checks
from leakatlas.blocks.labels.counts import round_counts
from leakatlas.blocks.labels.moments import HeadPass, class_row_sums


def remove_greedily(
    values: Tensor, impact: float, batch_size: int, *, offset: Tensor | None = None
) -> Tensor:
    """Counts ``(K,)`` by two stages of removal.

    Stage 1: every negative class gives one label. Stage 2: subtract the offset, then give the
    smallest class a label and take the impact out of it, until there are B.

    Args:
        values: ``G_c`` or ``g_c``, ``(K,)``.
        impact: Contribution of one own sample, negative.
        batch_size: B.
        offset: Value of a class that is absent, ``(K,)``; None for 0.
    """
    _checks.vector("remove_greedily", "values", values)
    _checks.batch("remove_greedily", batch_size)
    left = torch.nan_to_num(values.detach().double(), nan=0.0)
    counts = torch.zeros(left.shape, dtype=torch.int64, device=left.device)
    if not impact < 0:
        return round_counts(torch.zeros_like(left), batch_size)
    order = left.argsort(stable=True)
    certain = order[left[order] < 0][:batch_size]
    counts[certain] = 1
    left[certain] -= impact
    if offset is not None:
        left -= offset.to(left)
    for _ in range(batch_size - len(certain)):
        c = int(left.argmin())
        counts[c] += 1
        left[c] -= impact
    return counts


def llg_impact(row_sums: Tensor, batch_size: int) -> float:
    """LLG: ``(1/B)(1 + 1/K)`` times the sum of the negative row sums."""
    return float(row_sums.clamp(max=0).sum()) * (1 + 1 / row_sums.numel()) / batch_size


def llg(weight_grad: Tensor, batch_size: int) -> Tensor:
    """Label leakage from the gradient alone, ``(K,)`` counts."""
    _checks.matrix("llg", weight_grad)
    rows = weight_grad.double().sum(dim=1)
    return remove_greedily(rows, llg_impact(rows, batch_size), batch_size)


def llg_white_box(weight_grad: Tensor, seen: HeadPass, batch_size: int) -> Tensor:
    """LLG* with dummy inputs, LLG+ with labelled public data, ``(K,)`` counts.

    The impact is the mean of ``G_c`` over batches all of class c, per sample and times
    ``(1 + 1/K)``; the offset of c is the mean ``G_c`` over batches of the other classes.

    Args:
        weight_grad: Gradient of the head's weight ``(K, D)``.
        seen: A pass of dummy inputs (LLG*) or of public data with labels (LLG+).
        batch_size: B.
    """
    _checks.matrix("llg_white_box", weight_grad)
    alone = class_row_sums(seen)
    classes = len(alone)
    own = alone.diagonal()
    impact = float(own.mean()) * (1 + 1 / classes) / batch_size
    offset = (alone.sum(dim=0) - own) / max(classes - 1, 1)
    return remove_greedily(weight_grad.double().sum(dim=1), impact, batch_size, offset=offset)


def e2egi(weight_grad: Tensor, batch_size: int) -> Tensor:
    """E2EGI: the largest positive row sum estimates the scale, ``(K,)`` counts.

    A class that is absent has ``G_c = s / K`` at uniform output, so K/B times the largest one is
    what a single sample takes away.
    """
    _checks.matrix("e2egi", weight_grad)
    rows = weight_grad.double().sum(dim=1)
    largest = float(rows.max())
    impact = -largest * len(rows) / batch_size if largest > 0 else llg_impact(rows, batch_size)
    return remove_greedily(rows, impact, batch_size)


def bias_corrected(bias_grad: Tensor, batch_size: int, *, as_released: bool = False) -> Tensor:
    """The same removal on the bias gradient, ``(K,)`` counts.

    Args:
        bias_grad: ``(K,)``.
        batch_size: B.
        as_released: Take the released impact, the sum of negative entries over B. It is too small
            once the number of present classes is not small against K. By default the impact is
            -1/B, which the identity makes exact.
    """
    _checks.vector("bias_corrected", "bias_grad", bias_grad)
    impact = float(bias_grad.double().clamp(max=0).sum()) / batch_size
    return remove_greedily(bias_grad, impact if as_released else -1.0 / batch_size, batch_size)
