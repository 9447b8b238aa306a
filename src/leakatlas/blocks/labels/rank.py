r"""RLG: the label set from the row space of the head's gradient, by linear programming.

Dang, Thakkar, Ramaswamy, Mathews, Chin and Beaufays, "Revealing and Protecting Labels in
Distributed Training", NeurIPS 2021.

.. math:: \nabla W = U \Sigma V^\top, \qquad
          c \in \text{labels} \iff \exists v:\ u_c v < 0 \le u_k v \ \ \forall k \ne c

because each sample's ``p - y`` lies in the column space and has one negative entry, at its label.
Neither weights nor the sign of features matter. When the rank reaches K - 1 every class passes and
the answer says nothing; the rank is returned with it.

Departures: the paper solves one linear program a class; released code puts a perceptron with a
heuristic threshold before it. Here it is the linear program alone (HiGHS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leakatlas.blocks.labels import _checks


@dataclass(frozen=True, kw_only=True)
class RankedSet:
    """The label set of RLG.

    Args:
        present: ``(K,)`` boolean.
        rank: Numerical rank S of the gradient; at K - 1 ``present`` is all true and void.
    """

    present: Tensor
    rank: int

    @property
    def informative(self) -> bool:
        """Whether the rank leaves room for a class to be absent."""
        return self.rank < len(self.present) - 1


def rlg(weight_grad: Tensor, *, tolerance: float | None = None) -> RankedSet:
    """Which classes are in the batch, from the weight gradient ``(K, D)`` alone.

    Args:
        weight_grad: Gradient of the head's weight.
        tolerance: Singular values below this share of the largest are noise; by default
            ``max(K, D)`` machine epsilons of the gradient's own precision.
    """
    _checks.matrix("rlg", weight_grad)
    precision = weight_grad.dtype if weight_grad.is_floating_point() else torch.float32
    if tolerance is None:
        tolerance = max(weight_grad.shape) * torch.finfo(precision).eps
    left, values, _ = torch.linalg.svd(weight_grad.double(), full_matrices=False)
    rank = int((values > tolerance * values[0]).sum()) if float(values[0]) > 0 else 0
    u: np.ndarray[tuple[int, int], np.dtype[np.float64]] = left[:, :rank].cpu().numpy()
    found = [rank > 0 and _separable(u, c) for c in range(len(u))]
    return RankedSet(present=torch.tensor(found, device=weight_grad.device), rank=rank)


def _separable(u: np.ndarray[tuple[int, int], np.dtype[np.float64]], c: int) -> bool:
    """Is there a v with ``u_c v = -1`` and ``u_k v >= 0`` for every other k?"""
    if not u[c].any():
        return False
    from scipy.optimize import linprog  # half a second to import, and few runs need it

    found = linprog(
        np.zeros(u.shape[1]),
        A_ub=-np.delete(u, c, axis=0),
        b_ub=np.zeros(len(u) - 1),
        A_eq=u[c : c + 1],
        b_eq=[-1.0],
        bounds=(None, None),
        method="highs",
    )
    return bool(found.status == 0)
