r"""The identity behind every count-based rule, and the rounding they share.

With mean-reduced cross-entropy over B samples, any network and any training state,

.. math:: n_c = B\,(\bar p_c - g_c), \qquad g_c = \partial L / \partial b_c ,

where :math:`\bar p` is the batch mean of the softmax output. The gradient is observed; methods
differ in how they guess :math:`\bar p`. The functions below are the identity, the estimators of
:math:`\bar p` and one rounding step; a rule is one of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.blocks.labels import _checks
from leakatlas.errors import InvalidInput


def counts_from_bias(bias_grad: Tensor, mean_probability: Tensor, batch_size: int) -> Tensor:
    """The identity: real-valued counts ``(K,)`` in float64.

    Exact if ``mean_probability`` is the batch's own. Their sum is B whenever ``mean_probability``
    sums to 1, right or wrong, since bias gradients sum to 0.

    Args:
        bias_grad: Mean-reduced gradient of the head's bias ``(K,)``.
        mean_probability: The batch mean of the softmax output ``(K,)``, or a guess of it.
        batch_size: B.
    """
    _checks.vector("counts_from_bias", "bias_grad", bias_grad)
    if mean_probability.shape != bias_grad.shape:
        raise InvalidInput(
            f"counts_from_bias: mean_probability must be {tuple(bias_grad.shape)}, got "
            f"{tuple(mean_probability.shape)}."
        )
    _checks.batch("counts_from_bias", batch_size)
    return batch_size * (mean_probability.double() - bias_grad.double())


def counts_from_weight(
    weight_grad: Tensor, mean_probability: Tensor, mean_feature_sum: Tensor | float, batch_size: int
) -> Tensor:
    """The identity without a bias: ``B (p_c - G_c / s)`` with ``G_c`` the sum of row c, ``(K,)``.

    Exact only if all samples have the same feature sum ``s``; for a real batch it is an estimate.

    Args:
        weight_grad: Mean-reduced gradient of the head's weight ``(K, D)``.
        mean_probability: Batch mean of the softmax output ``(K,)``, or a guess.
        mean_feature_sum: Batch mean of ``sum_j h_j``, or a guess; must not be near 0.
        batch_size: B.
    """
    _checks.matrix("counts_from_weight", weight_grad)
    _checks.batch("counts_from_weight", batch_size)
    rows = weight_grad.double().sum(dim=1)
    return batch_size * (mean_probability.double() - rows / mean_feature_sum)


def uniform(classes: int, *, like: Tensor) -> Tensor:
    """The estimate of the mean probability that costs nothing: 1/K each, ``(K,)``."""
    return torch.full((classes,), 1.0 / classes, dtype=torch.float64, device=like.device)


def mean_probability(logits: Tensor) -> Tensor:
    """The mean of softmax over any inputs the adversary holds, ``(N, K)`` to ``(K,)`` float64.

    Dummy inputs and public data give the two usual estimates.
    """
    if logits.ndim != 2 or logits.shape[0] == 0:
        raise InvalidInput(f"mean_probability: logits must be (N, K), got {tuple(logits.shape)}.")
    return logits.detach().double().softmax(dim=1).mean(dim=0)


def uniform_counts(bias_grad: Tensor, batch_size: int) -> Tensor:
    """Baseline of every label rule: :func:`counts_from_bias` at 1/K, rounded, ``(K,)`` integers."""
    p = uniform(bias_grad.numel(), like=bias_grad)
    return round_counts(counts_from_bias(bias_grad, p, batch_size), batch_size)


def round_counts(raw: Tensor, batch_size: int) -> Tensor:
    """Integers that sum to B, as near to ``raw`` as largest remainders allow, ``(K,)`` int64.

    Values are clipped to [0, B] and floored; what is missing goes one by one to the class with the
    largest shortfall, what is too much is taken from the class with the largest excess that still
    has one. NaN counts as 0, infinities as the end of the range. Ties go to the lower class, so a
    vector without any information spreads the batch evenly.
    """
    _checks.vector("round_counts", "raw", raw)
    _checks.batch("round_counts", batch_size)
    target = torch.nan_to_num(
        raw.detach().double(), nan=0.0, posinf=float(batch_size), neginf=0.0
    ).clamp(0, batch_size)
    # 2.9999999 is a 3 spoilt by rounding; flooring it would start one short
    whole = (target + 1e-9).floor()
    shortfall = target - whole
    left = int(batch_size - whole.sum())
    for _ in range(abs(left)):
        if left > 0:
            c = int(shortfall.argmax())
            whole[c] += 1
            shortfall[c] -= 1
        else:
            c = int(torch.where(whole > 0, shortfall, torch.inf).argmin())
            whole[c] -= 1
            shortfall[c] += 1
    return whole.long()


def labels_from_counts(counts: Tensor) -> Tensor:
    """The multiset of labels in ascending order, ``(K,)`` counts to ``(B,)`` labels."""
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts.long())
