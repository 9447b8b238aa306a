"""The Gaussian mechanism on named tensors: clip to a bound, add noise of a standard deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Clipping = Literal["flat", "per_layer"]
"""One bound for all tensors together, or the same bound for each of them."""


def clip_factors(
    tensors: Mapping[str, Tensor], bound: float, clipping: Clipping, *, per_example: bool = False
) -> dict[str, Tensor]:
    """``min(1, bound / norm)`` for every tensor.

    Args:
        tensors: By name; ``(*shape)``, or ``(B, *shape)`` with ``per_example``.
        bound: Largest allowed L2 norm.
        clipping: Norm over all tensors (``flat``), or of each one.
        per_example: Whether dimension 0 runs over examples, each clipped by itself.

    Returns:
        Scalars, or ``(B,)`` with ``per_example``. All-zero tensors get 1.
    """
    keep = 1 if per_example else 0
    # One flattening for both cases: (B, D) or (1, D).
    norms = {
        name: torch.linalg.vector_norm(t.flatten(1) if keep else t.reshape(1, -1), dim=1)
        for name, t in tensors.items()
    }
    if clipping == "flat":
        joint = torch.linalg.vector_norm(torch.stack(list(norms.values())), dim=0)
        norms = dict.fromkeys(norms, joint)
    factors = {
        name: (bound / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        for name, norm in norms.items()
    }
    return factors if per_example else {name: factor[0] for name, factor in factors.items()}


def clip(tensors: Mapping[str, Tensor], bound: float, clipping: Clipping) -> dict[str, Tensor]:
    """The tensors scaled down to the bound; differentiable."""
    factors = clip_factors(tensors, bound, clipping)
    return {name: tensor * factors[name] for name, tensor in tensors.items()}


def clipped_sum(
    per_example: Mapping[str, Tensor], bound: float, clipping: Clipping
) -> dict[str, Tensor]:
    """Sum of per-example gradients ``(B, *shape)``, each clipped to the bound first."""
    factors = clip_factors(per_example, bound, clipping, per_example=True)
    return {
        name: torch.tensordot(factors[name], gradients, dims=1)
        for name, gradients in per_example.items()
    }


def joint_bound(bound: float, clipping: Clipping, tensors: int) -> float:
    """Largest norm over all tensors together after clipping.

    ``L`` tensors clipped to ``C`` each can reach ``C * sqrt(L)`` together; this, not ``C``, is
    what noise must be measured against.
    """
    return bound if clipping == "flat" else bound * math.sqrt(tensors)


def gaussian(
    like: Mapping[str, Tensor], std: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Independent N(0, std²) in the shape, dtype and device of ``like``."""
    return {
        name: (torch.randn(t.shape, generator=generator, dtype=t.dtype) * std).to(t.device)
        for name, t in like.items()
    }
