"""How much of the batch's labels was recovered.

All functions compare count vectors ``(K,)``: how often each class occurs. :func:`irec` is the one
to report. ``LeAcc`` and ``LnAcc`` are dominated by absent classes (predicting nothing at all scores
0.976 with 24 samples of 1,000 classes), so :func:`label_scores` prints them beside that baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput


def counts_of(labels: Tensor, classes: int) -> Tensor:
    """How often each of ``classes`` classes occurs in ``labels`` ``(B,)``, as ``(K,)`` integers."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise InvalidInput(
            f"counts_of: labels must be integers (B,), got {labels.dtype} {tuple(labels.shape)}; "
            "take the argmax of soft labels first."
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InvalidInput(
            f"counts_of: labels must lie in 0..{classes - 1}, got "
            f"{int(labels.min())}..{int(labels.max())}."
        )
    return torch.bincount(labels.long(), minlength=classes)


def _checked(who: str, n_hat: Tensor, n: Tensor) -> None:
    if n_hat.ndim != 1 or n_hat.shape != n.shape:
        raise InvalidInput(
            f"{who}: expected two count vectors of one length, got {tuple(n_hat.shape)} and "
            f"{tuple(n.shape)}."
        )
    if not bool((n >= 0).all()) or not bool((n_hat >= 0).all()):
        raise InvalidInput(f"{who}: counts must be non-negative numbers; round and clip them.")
    if int(n.sum()) == 0:
        raise InvalidInput(f"{who}: the true batch is empty; there is nothing to recover.")


def irec(n_hat: Tensor, n: Tensor) -> float:
    """Share of the batch's labels recovered as a multiset: ``sum_c min(n_hat_c, n_c) / B``."""
    _checked("irec", n_hat, n)
    return float(torch.minimum(n_hat, n).sum() / n.sum())


def le_acc(n_hat: Tensor, n: Tensor) -> float:
    """Share of classes whose *existence* in the batch is right."""
    _checked("le_acc", n_hat, n)
    return float(((n_hat > 0) == (n > 0)).double().mean())


def ln_acc(n_hat: Tensor, n: Tensor) -> float:
    """Share of classes whose *count* in the batch is right."""
    _checked("ln_acc", n_hat, n)
    return float((n_hat == n).double().mean())


def exact_batch(n_hat: Tensor, n: Tensor) -> bool:
    """Is every count right? One wrong label already spoils image recovery."""
    _checked("exact_batch", n_hat, n)
    return bool((n_hat == n).all())


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """All label measures of one batch.

    Args:
        irec: Multiset overlap in [0, 1], the measure to report.
        le_acc: Existence accuracy over all classes.
        ln_acc: Count accuracy over all classes.
        exact_batch: Whether every count is right.
        empty_le_acc: What predicting no label at all would score on ``le_acc``.
        empty_ln_acc: The same for ``ln_acc``.
    """

    irec: float
    le_acc: float
    ln_acc: float
    exact_batch: bool
    empty_le_acc: float
    empty_ln_acc: float


def label_scores(n_hat: Tensor, n: Tensor) -> LabelScores:
    """Every label measure of ``n_hat`` against the truth ``n``, with the empty prediction's."""
    nothing = torch.zeros_like(n)
    return LabelScores(
        irec=irec(n_hat, n),
        le_acc=le_acc(n_hat, n),
        ln_acc=ln_acc(n_hat, n),
        exact_batch=exact_batch(n_hat, n),
        empty_le_acc=le_acc(nothing, n),
        empty_ln_acc=ln_acc(nothing, n),
    )
