"""What an adversary without any update would hand in.

A reconstruction is worth what it adds to these. The constant and the nearest-neighbour baseline
are strict on purpose: the second is chosen with the truth in hand, so it bounds what any amount of
public look-alikes can explain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.metrics import _checks


def _public(who: str, public: Tensor) -> None:
    _checks.images(who, "public", public)
    if public.shape[0] == 0:
        raise InvalidInput(f"{who}: needs at least one public image, got none.")


def mean_image(public: Tensor) -> Tensor:
    """Mean of the public images ``(P, C, H, W)``, as ``(C, H, W)`` float64."""
    _public("mean_image", public)
    return public.double().mean(dim=0)


def nearest_public(originals: Tensor, public: Tensor) -> Tensor:
    """For each original its nearest public image by MSE, ``(B, C, H, W)`` float64."""
    _public("nearest_public", public)
    _checks.images("nearest_public", "originals", originals)
    if originals.shape[1:] != public.shape[1:]:
        raise InvalidInput(
            f"nearest_public: public images must be {tuple(originals.shape[1:])} like the "
            f"originals, got {tuple(public.shape[1:])}."
        )
    rows, columns = public.double().flatten(1), originals.double().flatten(1)
    # ||p - x||^2 without ||x||^2: one matrix product, since only the order matters
    distance = rows.square().sum(dim=1, keepdim=True) - 2 * rows @ columns.T
    return public.double()[distance.argmin(dim=0)]


def random_same_class(
    labels: Tensor, public: Tensor, public_labels: Tensor, *, generator: torch.Generator
) -> Tensor:
    """For each label a random public image of that class, ``(B, C, H, W)`` float64.

    A class without any public image gets the mean public image.

    Args:
        labels: Labels of the private batch ``(B,)``.
        public: Public images ``(P, C, H, W)``.
        public_labels: Their labels ``(P,)``.
        generator: Source of the draw (on the CPU).
    """
    _public("random_same_class", public)
    if public_labels.shape != public.shape[:1]:
        raise InvalidInput(
            f"random_same_class: expected {public.shape[0]} public labels, got shape "
            f"{tuple(public_labels.shape)}."
        )
    drawn = mean_image(public).repeat(labels.shape[0], 1, 1, 1)
    for i, label in enumerate(labels.tolist()):
        members = (public_labels == label).nonzero().flatten()
        if len(members):
            pick = int(torch.randint(len(members), (1,), generator=generator))
            drawn[i] = public[members[pick]].double()
    return drawn
