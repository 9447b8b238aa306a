r"""Linear systems in float64 that say how much of the unknown they determine.

The system of one convolution has a structure worth using: every input channel meets the *same*
gradient constraints. With ``K`` ``(q, P)`` for one channel of P positions, and W the convolution,

.. math:: K X_c = G_c \;\; (c = 1..C), \qquad W\, \mathrm{vec}(X) = z ,

the singular value decomposition of the small K solves the directions that the gradient determines,
and only the others enter a system with W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput


@dataclass(frozen=True)
class Solution:
    """A least-squares solution and what stood behind it.

    Args:
        x: The solution; of minimum norm in undetermined directions.
        rank: Directions that the constraints determine.
        length: Unknowns.
        residual: Norm of what is left, relative to the right-hand side.
    """

    x: Tensor
    rank: int
    length: int
    residual: float

    @property
    def full_rank(self) -> bool:
        """Whether the solution is the only one."""
        return self.rank == self.length


def solve(a: Tensor, b: Tensor, *, tolerance: float = 1e-6) -> Solution:
    """Least squares for one right-hand side, in float64.

    The rank is counted on the eigenvalues of ``A^T A``, which resolve singular values down to
    about 1e-7 of the largest. At full rank the solution comes from a QR factorisation, which does
    not square the condition number.

    Args:
        a: ``(m, n)``.
        b: ``(m,)``.
        tolerance: Singular values below this share of the largest count as zero.

    Raises:
        InvalidInput: If the shapes do not fit or a value is not finite.
    """
    if a.dim() != 2 or b.shape != a.shape[:1]:
        raise InvalidInput(f"solve: A (m, n) and b (m,), got {tuple(a.shape)}, {tuple(b.shape)}.")
    a, b = a.double(), b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InvalidInput("solve: the system holds non-finite values.")
    m, n = a.shape
    gram = a.T @ a
    values, vectors = torch.linalg.eigh(gram) if m < n else (torch.linalg.eigvalsh(gram), None)
    kept = values > tolerance**2 * values[-1].clamp(min=torch.finfo(a.dtype).tiny)
    rank = int(kept.sum())
    if rank == n:
        x = torch.linalg.lstsq(a, b[:, None], driver="gels").solution[:, 0]
    else:
        if vectors is None:
            values, vectors = torch.linalg.eigh(gram)
        projected = vectors[:, kept].T @ (a.T @ b)
        x = vectors[:, kept] @ (projected / values[kept])
    left = (a @ x - b).norm() / b.norm().clamp(min=torch.finfo(a.dtype).tiny)
    return Solution(x, rank, n, float(left))


def solve_shared(
    k: Tensor,
    g: Tensor,
    apply: Callable[[Tensor, int], Tensor],
    z: Tensor,
    *,
    tolerance: float = 1e-6,
) -> Solution:
    """Least squares for ``K X_c = G_c`` of every channel c, and ``sum_c W_c X_c = z``.

    Directions whose singular value of K exceeds ``sqrt(tolerance)`` times the largest come from
    the gradient alone; the rest are solved together, their weak gradient rows included.

    Args:
        k: ``(q, P)`` gradient constraints of one channel.
        g: ``(C, q)`` their right-hand sides.
        apply: ``(directions (J, P), channel) -> (J, r)``: the convolution of one channel.
        z: ``(r,)`` pre-activations.
        tolerance: As in :func:`solve`.

    Returns:
        ``x`` as ``(C, P)``.
    """
    k, g, z = k.double(), g.double(), z.double()
    channels, positions = len(g), k.shape[1]
    u, s, vh = torch.linalg.svd(k, full_matrices=True)
    largest = float(s[0].clamp(min=torch.finfo(s.dtype).tiny))
    s = torch.nn.functional.pad(s, (0, positions - len(s)))
    projected = torch.nn.functional.pad(
        g @ u[:, : min(k.shape)], (0, max(positions - min(k.shape), 0))
    )  # (C, P)
    strong = s > tolerance**0.5 * largest
    x = (projected[:, strong] / s[strong]) @ vh[strong]
    weak = ~strong
    free = int(weak.sum())
    rank = channels * int(strong.sum())
    if free:
        basis = vh[weak]  # (J, P)
        known = torch.stack([apply(x[c][None], c)[0] for c in range(channels)]).sum(0)
        convolved = torch.cat([apply(basis, c) for c in range(channels)]).T  # (r, C J)
        scale = convolved.norm(dim=0).max().clamp(min=torch.finfo(s.dtype).tiny)
        present = torch.nonzero(s[weak] > 0).flatten()
        rows = [convolved / scale]
        right = [(z - known) / scale]
        if len(present):
            block = torch.zeros(len(present), free, dtype=torch.float64, device=k.device)
            block[torch.arange(len(present)), present] = s[weak][present] / largest
            rows.append(torch.block_diag(*([block] * channels)))
            right.append((projected[:, weak][:, present] / largest).flatten())
        inner = solve(torch.cat(rows), torch.cat(right), tolerance=tolerance)
        x = x + inner.x.reshape(channels, free) @ basis
        rank += inner.rank
    reached = torch.stack([apply(x[c][None], c)[0] for c in range(channels)]).sum(0)
    tiny = torch.finfo(torch.float64).tiny
    gradient_left = (x @ k.T - g).norm() / g.norm().clamp(min=tiny)
    weight_left = (reached - z).norm() / z.norm().clamp(min=tiny)
    return Solution(x, rank, channels * positions, float(torch.maximum(gradient_left, weight_left)))
