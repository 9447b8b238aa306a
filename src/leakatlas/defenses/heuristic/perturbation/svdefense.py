r"""SVDefense: send only the strongest singular directions of every layer's update.

Luo, Yau and Song, "SVDefense: Effective Defense against Gradient Inversion Attacks via Singular
Value Decomposition", NDSS 2026 (arXiv 2510.03319).

Every tensor with two or more dimensions is a matrix :math:`M` (first dimension times the rest). Its
rows, the output channels, are weighted by their norms, the product is cut to its :math:`r` largest
singular values, and the weights are taken off again:

.. math:: \hat M = D^{-1} \, [D M]_r, \qquad D = \mathrm{diag}(\lVert M_c \rVert^{\gamma}), \qquad
          r = \min \{ k : \sum_{i \le k} \sigma_i^2 \ge \tau \sum_i \sigma_i^2 \},

so that what is cut is paid by channels that matter little for training. The energy threshold
adapts to the client: one whose singular values are few (few classes, few images) leaks more, and
keeps less,

.. math:: \tau = E^{\,1 + a (1 - H)}, \qquad
          H = \text{mean over layers of } \frac{-\sum_i p_i \log p_i}{\log \min(m, n)},
          \quad p_i = \sigma_i^2 / \textstyle\sum_j \sigma_j^2 .

What an adversary does about it: the upload shows the rank that was kept. Cutting the own candidates
to that rank matches all that is left; the slope must pass as if nothing were cut, since along its
own directions a candidate never gains those that it lacks (that, and comparing on the observed row
space alone, do worse than ignoring the defense).

And a matrix of rank one has nothing to cut: the gradient of a linear layer on one
image is :math:`\delta x^T`, which passes whole at any threshold, so that row over bias still gives
the image exactly; on N images its rank is at most N.

Measured (studies ``svdefense`` and ``lti``): a rehearsed [3] that cuts its own candidates loses
little, fresh or trained, one that ignores the defense hardly more, and a search with a generative
prior still draws the image; accuracy pays more than they do.

Departures (the paper's formulas were not at hand; this is rebuilt from its abstract):
    * The three formulas above are ours: that the threshold follows the entropy of the singular
      values, and that channels are weighted, is all that was read.
    * Biases and other vectors, matrices of rank one, are sent as they are.
    * The layer-wise weights of the server's average are left out: they change no upload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense, Update
from leakatlas.params import NonNegative


@dataclass(frozen=True, kw_only=True)
class SVDefense(Defense):
    """Truncated singular value decomposition of every matrix of an update.

    Args:
        energy: Share E of the squared singular values that is kept at least; 1 sends everything.
        adaptivity: How strongly few singular values lower the threshold, a; 0: not at all.
        channel_weight: Exponent gamma of the channels' norms; 0 treats channels alike.
    """

    key: ClassVar[str] = "svdefense"
    knob: ClassVar[str] = "energy"
    neutral: ClassVar[float] = 1.0
    strengths: ClassVar[tuple[float, ...]] = (0.9, 0.8, 0.6)
    stage: ClassVar[int] = 50
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    energy: Annotated[float, Field(gt=0, le=1)] = 0.8
    adaptivity: NonNegative = 1.0
    channel_weight: NonNegative = 0.5

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the truncated matrices, and vectors as they are."""
        del context
        if self.energy == 1:
            return update
        threshold = self.threshold(update.tensors)
        return update.with_tensors(
            {
                name: truncated(t, threshold, self.channel_weight) if t.dim() > 1 else t
                for name, t in update.tensors.items()
            }
        )

    def threshold(self, tensors: Mapping[str, Tensor]) -> float:
        """The share tau of the energy that this client keeps."""
        spread = entropy(tensors)
        return float(self.energy ** (1 + self.adaptivity * (1 - spread)))

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's matrices, cut to the ranks that the observed ones show.

        At the truth this equals the observation.
        """
        del x, y
        if self.energy == 1:
            return update
        return {
            name: cut_alike(t, observed.tensors[name], self.channel_weight) if t.dim() > 1 else t
            for name, t in update.items()
        }


def matrix(tensor: Tensor) -> Tensor:
    """A tensor as output channels times all the rest."""
    return tensor.reshape(len(tensor), -1)


def entropy(tensors: Mapping[str, Tensor]) -> float:
    """H in [0, 1]: how evenly the energy is spread over singular values, meaned over matrices.

    Vectors, single rows or columns, and zeros say nothing; 1 if there is nothing else.
    """
    found: list[float] = []
    for tensor in tensors.values():
        if tensor.dim() < 2 or min(matrix(tensor).shape) < 2 or not bool(tensor.any()):
            continue
        squares = torch.linalg.svdvals(matrix(tensor).detach().double()).square()
        p = squares / squares.sum()
        found.append(float(torch.special.entr(p).sum()) / math.log(len(p)))
    return sum(found) / len(found) if found else 1.0


def truncated(tensor: Tensor, threshold: float, channel_weight: float) -> Tensor:
    r"""The least singular directions of the weighted matrix that hold the energy, weights undone.

    Args:
        tensor: Two or more dimensions.
        threshold: Share tau of the energy, in (0, 1).
        channel_weight: Exponent gamma.
    """
    M = matrix(tensor)
    if not bool(M.any()):
        return tensor
    _, S, Vh = torch.linalg.svd(weighted(M, channel_weight), full_matrices=False)
    return projected(tensor, Vh[: rank(S, threshold)])


def weighted(M: Tensor, channel_weight: float) -> Tensor:
    """The rows of ``M`` in float64, times a power of their norms over the largest of those."""
    M = M.double()
    norms = torch.linalg.vector_norm(M, dim=1, keepdim=True)
    made: Tensor = (norms / norms.max().clamp(min=torch.finfo(M.dtype).tiny)).pow(
        channel_weight
    ) * M
    return made


def rank(S: Tensor, threshold: float) -> int:
    """How many of the singular values ``S``, largest first, hold a share ``threshold`` of it."""
    energy = S.square().cumsum(0)
    return int((energy < threshold * energy[-1]).sum()) + 1


def projected(tensor: Tensor, Vh: Tensor) -> Tensor:
    """A matrix on the space of the orthonormal rows ``Vh`` ``(r, n)``.

    That undoes the weights by itself: ``D^-1 [D M]_r = M V V^T``, since D acts from the left.
    """
    V = Vh.to(tensor.dtype)
    found: Tensor = matrix(tensor) @ V.T @ V
    return found.reshape(tensor.shape)


def cut_alike(tensor: Tensor, observed: Tensor, channel_weight: float) -> Tensor:
    """A candidate's matrix, cut as the defense would cut it to the rank that the upload shows.

    The slope is that of the whole matrix, as if nothing were cut: along the candidate's own
    directions alone, a candidate never gains those that it lacks.
    """
    M = matrix(observed).detach().double()
    shown = int(torch.linalg.matrix_rank(M, rtol=max(M.shape) * torch.finfo(observed.dtype).eps))
    own = matrix(tensor).detach().nan_to_num()  # a candidate that diverged is the loop's to halt
    _, _, Vh = torch.linalg.svd(weighted(own, channel_weight), full_matrices=False)
    cut = projected(own, Vh[:shown]).reshape(tensor.shape)
    passed: Tensor = tensor + (cut - tensor).detach()
    return passed
