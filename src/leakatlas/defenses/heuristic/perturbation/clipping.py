r"""Gradient clipping, as audited by GGL [44]: the batch gradient is scaled down to a norm bound.

.. math:: g \leftarrow g \cdot \min\Bigl(1, \frac{C}{\lVert g\rVert_2 + 10^{-6}}\Bigr)

over the whole update, or over each tensor. This is one positive factor (or one for each tensor):
directions, weight-to-bias ratios and signs are untouched, and without noise it is no differential
privacy. Clipping every example's gradient, which does change directions, belongs to the DP rows.

Departures: none; the 1e-6 is that of ``torch.nn.utils.clip_grad_norm_``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense, Update
from leakatlas.params import PositiveOrInf

_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class Clipping(Defense):
    """Scales an update down to norm ``max_norm``.

    Args:
        max_norm: Bound C in the units of the update (4 in GGL's audit); infinity sends all.
        per_layer: Whether each tensor has its own norm and the bound holds for each.
    """

    key: ClassVar[str] = "clipping"
    knob: ClassVar[str] = "max_norm"
    neutral: ClassVar[float] = float("inf")
    strengths: ClassVar[tuple[float, ...]] = (4.0, 1.0, 0.1)
    stage: ClassVar[int] = 40
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    max_norm: PositiveOrInf = 4.0
    per_layer: bool = False

    def update(self, update: Update, context: ClientContext) -> Update:
        """Scale the upload down."""
        del context
        if self.max_norm == float("inf"):
            return update
        return update.with_tensors(clipped(update.tensors, self.max_norm, per_layer=self.per_layer))

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The same factor on the candidate's update; the bound is no secret."""
        del x, y, observed
        if self.max_norm == float("inf"):
            return update
        return clipped(update, self.max_norm, per_layer=self.per_layer)


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm over all entries of all tensors, a scalar."""
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()])
    )
    return total


def clipped(
    tensors: Mapping[str, Tensor], bound: float, *, per_layer: bool = False
) -> dict[str, Tensor]:
    """The tensors, scaled by ``min(1, bound / (norm + 1e-6))``; differentiable."""
    if per_layer:
        return {
            name: t * _factor(torch.linalg.vector_norm(t), bound) for name, t in tensors.items()
        }
    factor = _factor(norm(tensors), bound)
    return {name: tensor * factor for name, tensor in tensors.items()}


def estimated_bound(observed: Update) -> float:
    """What an observer who was not told C takes it for: the norm that it sees.

    Exact (to 1e-6) whenever clipping was active, too small otherwise.
    """
    return float(norm(observed.tensors))


def _factor(size: Tensor, bound: float) -> Tensor:
    return (bound / (size + _EPSILON)).clamp(max=1.0)
