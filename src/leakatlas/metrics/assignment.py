"""Which candidate stands for which original: one to one, in the right direction.

An attack returns candidates in any order and any number; originals are the client's batch. The
cost matrix has a row a candidate and a column an original, ``(M, B)``. The answer is asked *of the
original*: "which candidate is yours?" Indexing candidates by the inverse permutation is a mistake
that no transposition of two images can show; it takes a cycle of three or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.metrics import _checks


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A one-to-one assignment of candidates to originals.

    Args:
        of_original: For each original the index of its candidate, or None if none is left.
        surplus: Usable candidates without an original (emitted beyond the batch).
        missing: Originals without a candidate; they count as failures.
    """

    of_original: tuple[int | None, ...]
    surplus: int
    missing: int


def pairwise_mse(candidates: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error of every pair, ``(M, B)`` in float64.

    Candidates ``(M, C, H, W)`` may hold non-finite pixels; their rows are then not finite either,
    and :func:`assign` leaves them out.
    """
    _checks.images("pairwise_mse", "originals", originals)
    if candidates.ndim != 4 or candidates.shape[1:] != originals.shape[1:]:
        raise InvalidInput(
            f"pairwise_mse: candidates must be (M, {', '.join(map(str, originals.shape[1:]))}) "
            f"like the originals, got {tuple(candidates.shape)}."
        )
    rows, columns = candidates.double().flatten(1), originals.double().flatten(1)
    # the matrix-product form of cdist cancels: an exact copy would get an error of 1e-8
    distance = torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / columns.shape[1]


def assign(cost: Tensor, *, allowed: Tensor | None = None) -> Assignment:
    """The one-to-one assignment of least total cost (Hungarian algorithm, SciPy).

    Args:
        cost: ``(M, B)``, a row a candidate, a column an original. A row with a non-finite entry is
            an unusable candidate and is neither assigned nor surplus.
        allowed: ``(M, B)`` boolean; pairs outside it are never assigned (label-constrained
            matching). As many originals as possible are served first, at least cost second.

    Raises:
        InvalidInput: If ``cost`` is no matrix, or ``allowed`` has another shape.
    """
    if cost.ndim != 2:
        raise InvalidInput(f"assign: cost must be (M, B), got shape {tuple(cost.shape)}.")
    if allowed is not None and allowed.shape != cost.shape:
        raise InvalidInput(
            f"assign: allowed must have the shape of cost {tuple(cost.shape)}, got "
            f"{tuple(allowed.shape)}."
        )
    originals = cost.shape[1]
    usable = torch.isfinite(cost).all(dim=1).nonzero().flatten()
    matrix = cost[usable].double().cpu()
    permitted = torch.ones_like(matrix, dtype=torch.bool)
    if allowed is not None:
        permitted = allowed[usable].bool().cpu()
        # dearer than any full assignment of permitted pairs, so taken only if unavoidable
        barrier = (matrix.abs().max() + 1.0) * (min(matrix.shape) + 1) if matrix.numel() else 0.0
        matrix = torch.where(permitted, matrix, matrix + barrier)
    chosen: list[int | None] = [None] * originals
    from scipy.optimize import linear_sum_assignment  # half a second to import

    for row, column in zip(*linear_sum_assignment(matrix.numpy()), strict=True):
        if permitted[row, column]:
            chosen[column] = int(usable[row])
    served = sum(c is not None for c in chosen)
    return Assignment(
        of_original=tuple(chosen), surplus=len(usable) - served, missing=originals - served
    )


def best_of(cost: Tensor) -> tuple[int | None, ...]:
    """For each original the cheapest candidate, *many to one*: inflated, for comparison only.

    Several published evaluations do this. One good candidate may then serve every original.
    """
    if cost.ndim != 2:
        raise InvalidInput(f"best_of: cost must be (M, B), got shape {tuple(cost.shape)}.")
    finite = torch.where(torch.isfinite(cost), cost, torch.inf)
    if not torch.isfinite(finite).any():
        return (None,) * cost.shape[1]
    return tuple(int(i) for i in finite.argmin(dim=0))
