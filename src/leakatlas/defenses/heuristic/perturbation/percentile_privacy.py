r"""NVFlare's ``PercentilePrivacy``: share only large changes of weights, and truncate them.

As shipped in NVFlare 2.9 (``nvflare.app_common.filters``), after Shokri and Shmatikov, "Privacy-
Preserving Deep Learning", CCS 2015. With the change of weights per local step,
:math:`d = (\theta_T - \theta_0) / T`, and c the percentile of all :math:`|d|` together,

.. math:: d \leftarrow \mathrm{clip}(d \cdot [\,|d| \ge c\,], -\gamma, \gamma)

and :math:`T d` is sent. It is deterministic, and no differential privacy.

What an adversary does about it: what was truncated lies exactly at the largest magnitude that is
sent, what was dropped is zero. It treats its own candidates alike, and lets slopes pass.

Departures:
    * A FedSGD upload is a gradient; the filter sees the change :math:`-\eta g` that it stands for.
    * The filter is told T by the trainer and takes 1 if it is not; here T is known.
    * At gamma = infinity the filter is off; NVFlare's would still drop the smallest changes.
    * NVFlare sends scalars (numbers without a dimension) as they are; so does this, and buffers,
      which NVFlare filters where they are part of the difference, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.fl import ActsOn, ClientContext, Defense, Update
from leakatlas.params import PositiveOrInf


@dataclass(frozen=True, kw_only=True)
class PercentilePrivacy(Defense):
    """Drops the smallest changes of weights and truncates the others.

    Args:
        gamma: Largest change of a weight per local step (0.01 shipped); infinity turns it off.
        percentile: Changes below this percentile of magnitudes are dropped (10 shipped).
    """

    key: ClassVar[str] = "percentile_privacy"
    knob: ClassVar[str] = "gamma"
    neutral: ClassVar[float] = float("inf")
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.01, 0.001)
    stage: ClassVar[int] = 50
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})

    gamma: PositiveOrInf = 0.01
    percentile: Annotated[float, Field(ge=0, le=100)] = 10.0

    def update(self, update: Update, context: ClientContext) -> Update:
        """Send the filtered change."""
        if self.gamma == float("inf"):
            return update
        unit = context.change_unit(update)
        sent = filtered(
            {name: t / unit for name, t in update.tensors.items()}, self.gamma, self.percentile
        )
        return update.with_tensors({name: t * unit for name, t in sent.items()})

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update on what was sent, truncated at the largest magnitude sent."""
        del x, y
        if self.gamma == float("inf"):
            return update
        bound = torch.stack([t.abs().max() for t in observed.tensors.values()]).max()
        found: dict[str, Tensor] = {}
        for name, v in update.items():
            kept = v * (observed.tensors[name] != 0)
            found[name] = kept + (kept.clamp(-bound, bound) - kept).detach()
        return found


def filtered(changes: dict[str, Tensor], gamma: float, percentile: float) -> dict[str, Tensor]:
    """The changes above the percentile of all magnitudes, truncated at gamma.

    Args:
        changes: By name; numbers without a dimension pass.
        gamma: Largest magnitude.
        percentile: In [0, 100], linear between two magnitudes.
    """
    magnitudes = torch.cat([t.abs().flatten() for t in changes.values()]).sort().values
    place = percentile / 100 * (len(magnitudes) - 1)
    low, high = magnitudes[int(place)], magnitudes[min(int(place) + 1, len(magnitudes) - 1)]
    cutoff = low + (place - int(place)) * (high - low)
    return {
        name: t if t.dim() == 0 else (t * (t.abs() >= cutoff)).clamp(-gamma, gamma)
        for name, t in changes.items()
    }
