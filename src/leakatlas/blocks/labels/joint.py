"""Labels as variables of the optimisation (DLG): the only rule for ordered, unknown labels.

Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019.

One logit vector *per sample*: a single vector shared by the batch, as in one released code, can
only describe batches of one class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.fl.losses import BCE, MSE, Loss


def joint_logits(
    batch_size: int, classes: int, *, generator: torch.Generator, like: Tensor
) -> Tensor:
    """Dummy label logits ``(B, K)`` from N(0, 1), distinct a sample, on ``like``'s device."""
    if batch_size < 1 or classes < 2:
        raise InvalidInput(
            f"joint_logits: needs batch_size >= 1 and classes >= 2, got {batch_size} and {classes}."
        )
    drawn = torch.randn(batch_size, classes, generator=generator, device=generator.device)
    return drawn.to(like)


def soft_labels(logits: Tensor) -> Tensor:
    """``softmax`` over classes: soft labels ``(B, K)`` that stay on the simplex."""
    return logits.softmax(dim=-1)


def soft_targets(loss: Loss, logits: Tensor) -> Tensor:
    """Free variables ``(B, K)`` in the range of the loss's targets.

    On the simplex for losses of one class; in [0, 1] each for several labels at once; as they are
    for values.
    """
    match loss:
        case BCE():
            return logits.sigmoid()
        case MSE():
            return logits
        case _:
            return soft_labels(logits)
