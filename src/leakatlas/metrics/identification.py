"""Can an image be told from others by its reconstruction? Retrieval in a stated gallery.

Yin et al., "See through Gradients", CVPR 2021 (image identifiability precision).

The answer depends on the gallery's size, on whether it was restricted to one class, and on the
embedding. All three belong beside the number, as does chance. Features must come from a *held-out*
encoder: the attacked model's own features are what the attack optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.errors import InvalidInput
from leakatlas.metrics.intervals import Interval, binomial


@dataclass(frozen=True, kw_only=True)
class Identified:
    """Image identifiability precision.

    Args:
        value: Share of originals whose reconstruction retrieves them.
        hits: Their number.
        gallery: Size of the gallery.
        chance: ``1 / gallery``.
        interval: Wilson interval of the share.
    """

    value: float
    hits: int
    gallery: int
    chance: float
    interval: Interval


def iip(
    features_hat: Tensor, gallery: Tensor, index: Tensor, *, found: Tensor | None = None
) -> Identified:
    """Share of originals that are the nearest gallery entry of their reconstruction (cosine).

    Args:
        features_hat: Features of the assigned reconstructions, one an original ``(B, D)``.
        gallery: Features of the gallery ``(M, D)``, originals among them.
        index: Place of each original in the gallery ``(B,)``.
        found: Which originals have a reconstruction at all ``(B,)``; the others are failures.
    """
    if features_hat.ndim != 2 or gallery.ndim != 2 or features_hat.shape[1] != gallery.shape[1]:
        raise InvalidInput(
            f"iip: expected features (B, D) and a gallery (M, D), got "
            f"{tuple(features_hat.shape)} and {tuple(gallery.shape)}."
        )
    batch, size = len(features_hat), len(gallery)
    if batch == 0 or index.shape != (batch,) or not bool(((index >= 0) & (index < size)).all()):
        raise InvalidInput(
            f"iip: index must give the place of each of {batch} originals (at least one) in a "
            f"gallery of {size}, got {index.tolist()}."
        )
    similarity = cosine(features_hat, gallery)
    right = similarity.argmax(dim=1) == index.to(similarity.device)
    # a zero or non-finite feature vector retrieves nothing; argmax would say entry 0
    right &= torch.isfinite(similarity).all(dim=1) & (features_hat.abs().sum(dim=1) > 0)
    if found is not None:
        right &= found.to(right)
    hits = int(right.sum())
    return Identified(
        value=hits / batch,
        hits=hits,
        gallery=size,
        chance=1 / size,
        interval=binomial(hits, batch),
    )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every pair, ``(A, D)`` and ``(B, D)`` to ``(A, B)`` float64."""
    return F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T


def feature_mse(features_hat: Tensor, features: Tensor) -> Tensor:
    """Mean squared distance of paired features ``(B, D)``, one value an image ``(B,)``."""
    if features_hat.shape != features.shape or features.ndim != 2:
        raise InvalidInput(
            f"feature_mse: expected two (B, D), got {tuple(features_hat.shape)} and "
            f"{tuple(features.shape)}."
        )
    return (features_hat.double() - features.double()).square().mean(dim=1)
