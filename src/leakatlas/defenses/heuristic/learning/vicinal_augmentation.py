r"""Vicinal augmentation (DPAug, GIAnDe; Ye et al., 2024): train on negated mixtures as well.

Every local batch of n images, in the model's normalised pixel space, is extended by

.. math:: \tilde x_i = -\lambda x_i + (1 - \lambda)\, x_{(i+1) \bmod n}, \qquad \tilde y_i = y_i,

with :math:`\lambda = 0.8`, and the mean loss is taken over the 2n images. :math:`\lambda = 1` is
the "reverse" variant. A negative image is one mirrored at the data set's mean.

What an adversary does about it: it optimises x alone and builds :math:`\tilde x(x)` inside its
objective; the true x is then an exact zero. For n = 1 the mixture is :math:`(1 - 2\lambda) x`, a
scaled copy, which a ratio read-out returns up to scale.

Departures: of the many mixing rules in ``MiLab-HITSZ/2023YeGIAnDe``, the one on which its client
(``secure_input``) and its attack code (``_extend_by_mix``) agree is implemented. Augmenting only a
part of the batch is ours: it makes the defense gradual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense
from leakatlas.params import Fraction


@dataclass(frozen=True, kw_only=True)
class VicinalAugmentation(Defense):
    """Appends a negated mixture of neighbours for a fraction of every local batch.

    Args:
        fraction: Share of the batch that is mixed and appended (all of it in the paper).
        mix: Weight lambda of the image's own negative; 1 for pure negatives.
    """

    key: ClassVar[str] = "vicinal_augmentation"
    knob: ClassVar[str] = "fraction"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.5, 1.0)
    stage: ClassVar[int] = 10
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    fraction: Fraction = 1.0
    mix: Fraction = 0.8

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """The batch with its mixtures behind it."""
        del context
        return self.simulate_batch(x, y)

    def simulate_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same rule on candidates: it has no secret."""
        count = math.ceil(self.fraction * len(x))
        if count == 0:
            return x, y
        return torch.cat([x, mixtures(x, self.mix)[:count]]), torch.cat([y, y[:count]])


def mixtures(x: Tensor, mix: float) -> Tensor:
    """``-mix * x_i + (1 - mix) * x_(i+1 mod n)`` of a batch ``(n, C, H, W)``."""
    return -mix * x + (1 - mix) * x.roll(-1, dims=0)
