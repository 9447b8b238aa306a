r"""Gradient pruning: top-k, large-gradient and dual.

Large-gradient pruning [43] and dual gradient pruning [42] withhold the *largest* entries of every
tensor, because a matching attack is driven by them; top-k, the compression rule that many attack
papers test against, withholds the smallest. One mechanism holds all three: of each tensor's
:math:`d` entries, :math:`n = \lfloor \rho d \rfloor` are withheld, :math:`n_1 = \lfloor s n
\rfloor` of them from the top and the rest from the bottom of :math:`|v|`,

.. math:: v = g + e, \qquad \text{sent} = m \odot v, \qquad e \leftarrow v - \text{sent},

with the error memory :math:`e` of the client. :math:`s = 0` is top-k, :math:`s = 1` large-gradient
pruning, and in between lies dual pruning (published: :math:`k_1 = 5\,\%` from the top and
:math:`k_2 = 75\,\%` from the bottom, hence :math:`\rho = 0.8`, :math:`s = 1/16`).

What an adversary does about it: the zeros show the support, and it compares only there.

Departures: both cited works are closed access; their rules are rebuilt from titles and citations.
Thresholds are taken per tensor and entries are counted, not compared with a threshold, so that
ties and all-zero tensors are pruned to the exact count; biases are pruned as any other tensor.
ADGP, which aligns the kept positions over the clients to save download, is left out: it needs a
trusted broadcaster and changes traffic, not what one upload shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense, Trait, Update
from leakatlas.params import Fraction


@dataclass(frozen=True, kw_only=True)
class GradientPruning(Defense):
    """Withholds a share of each tensor's entries by magnitude.

    Args:
        rate: Share of entries withheld, rho; 0 sends everything.
        largest_share: Share of the withheld entries taken from the top, s: 0 is top-k, 1 is
            large-gradient pruning.
        error_feedback: Whether withheld entries are added to the next round's update, as
            published; without it training stalls once large entries are withheld.
    """

    key: ClassVar[str] = "gradient_pruning"
    knob: ClassVar[str] = "rate"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.8, 0.95, 0.99)
    stage: ClassVar[int] = 50
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    rate: Annotated[float, Field(ge=0, lt=1)] = 0.8
    largest_share: Fraction = 0.0625
    error_feedback: bool = True

    @classmethod
    def top_k(cls, rate: float, *, error_feedback: bool = True) -> Self:
        """Keeps the largest ``ceil((1 - rate) d)`` entries of every tensor."""
        return cls(rate=rate, largest_share=0.0, error_feedback=error_feedback)

    @classmethod
    def large(cls, rate: float, *, error_feedback: bool = True) -> Self:
        """Withholds the largest ``floor(rate d)`` entries of every tensor."""
        return cls(rate=rate, largest_share=1.0, error_feedback=error_feedback)

    def active_traits(self) -> frozenset[Trait]:
        """Error feedback, while it is on and something is withheld."""
        on = self.error_feedback and self.rate > 0
        return frozenset({Trait.ERROR_FEEDBACK}) if on else frozenset()

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the kept entries and remember the others."""
        if self.rate == 0:
            return update
        memory: Mapping[str, Tensor] = context.memory.get("residual", {})
        sent: dict[str, Tensor] = {}
        residual: dict[str, Tensor] = {}
        for name, g in update.tensors.items():
            v = g + memory[name] if name in memory else g
            keep = kept(v, self.rate, self.largest_share)
            zero = torch.zeros_like(v)
            sent[name] = torch.where(keep, v, zero)
            residual[name] = torch.where(keep, zero, v)
        if self.error_feedback:
            context.memory["residual"] = residual
        return update.with_tensors(sent)

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update on the support of the observation.

        The mask is a constant, so gradients pass straight through the selection. At the truth
        this equals the observation as long as the error memory was empty.
        """
        del x, y
        if self.rate == 0:
            return update
        return {name: v * support(observed.tensors[name]).to(v.dtype) for name, v in update.items()}


def kept(v: Tensor, rate: float, largest_share: float) -> Tensor:
    """Which entries of ``v`` are sent: a boolean mask of its shape.

    Ties are broken by position, so that the count is exact.

    Args:
        v: Any shape, d entries.
        rate: Share of entries withheld.
        largest_share: Share of those taken from the top.
    """
    withheld, top = counts(v.numel(), rate, largest_share)
    order = v.detach().abs().reshape(-1).argsort(stable=True)  # ascending magnitude
    mask = torch.zeros(v.numel(), dtype=torch.bool, device=v.device)
    mask[order[withheld - top : v.numel() - top]] = True
    return mask.reshape(v.shape)


def counts(entries: int, rate: float, largest_share: float) -> tuple[int, int]:
    """How many entries are withheld in all, and how many of those from the top."""
    tolerance = 1e-9  # 0.29 * 100 is 28.999... in binary
    withheld = int(rate * entries + tolerance)
    return withheld, int(largest_share * withheld + tolerance)


def support(sent: Tensor) -> Tensor:
    """Positions that an upload visibly holds."""
    return sent != 0
