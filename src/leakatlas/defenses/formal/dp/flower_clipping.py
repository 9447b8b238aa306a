r"""Flower's fixed and adaptive clipping: clipped changes, and noise on the server's mean.

As shipped in Flower 1.42: ``fixedclipping_mod`` and ``adaptiveclipping_mod`` on the clients, with
``DifferentialPrivacyClientSideFixedClipping`` and ``...AdaptiveClipping`` around the server's
strategy. A client's change is scaled to norm C at most; m being the number of sampled clients, the
server adds

.. math:: \mathcal N\bigl(0, (z C / m)^2\bigr)

to the aggregate. With ``adaptive`` (Andrew et al., "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021) clients also say whether they had to clip; the server adds
:math:`\mathcal N(0, \sigma_b^2)` to the count, compares the share b with a quantile q, and

.. math:: C \leftarrow C \, e^{-\eta_C (b - q)}, \qquad
          z \leftarrow \bigl(z^{-2} - (2 \sigma_b)^{-2}\bigr)^{-1/2} .

What an adversary does about it: on the server and on the wire there is no noise at all; the clip is
a factor that cosines, ratios and signs do not notice.

Departures:
    * Flower's aggregate is weighted by examples, and its noise measured for 1/m each: with unequal
      clients the largest weight exceeds that, and the sensitivity with it. That is kept.
    * Server-side clipping, the other two wrappers, is the same arithmetic on the server.
    * Flower clips buffers with the parameters; here they are withheld, see ``local_dp_mod``.
    * At noise 0 nothing is clipped either: a bound without noise is no differential privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from leakatlas.defenses.formal.dp._mechanism import clip, gaussian
from leakatlas.errors import InvalidParameter
from leakatlas.fl import (
    ActsOn,
    ClientContext,
    Defense,
    Message,
    RoundSetup,
    ServerContext,
    Trait,
    Update,
)
from leakatlas.params import Fraction, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class FlowerClipping(Defense):
    """Clients clip their update, the server adds noise to the mean.

    Args:
        noise_multiplier: z; 0 turns the defense off.
        clipping_norm: C, or where it starts (0.1 shipped for the adaptive form, which has one).
        adaptive: Whether C follows a quantile of clients' norms.
        target_quantile: q, the share of clients that shall be clipped.
        clip_norm_lr: Rate of C.
        count_std: sigma_b, noise on the count of clipped clients; a twentieth of m if None.
    """

    key: ClassVar[str] = "flower_clipping"
    knob: ClassVar[str] = "noise_multiplier"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0)
    stage: ClassVar[int] = 40
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE})

    noise_multiplier: NonNegative = 1.0
    clipping_norm: Positive = 0.1
    adaptive: bool = False
    target_quantile: Fraction = 0.5
    clip_norm_lr: Positive = 0.2
    count_std: NonNegative | None = None

    def active_traits(self) -> frozenset[Trait]:
        """None while it is off."""
        return self.traits if self.noise_multiplier else frozenset()

    def multiplier(self, cohort: int) -> float:
        """Z on the mean: more, where the count of clipped clients spends a part.

        Raises:
            InvalidParameter: If the count's noise is too small for z.
        """
        if not self.adaptive:
            return self.noise_multiplier
        std = self._count_std(cohort)
        if self.noise_multiplier >= 2 * std:
            raise InvalidParameter(
                f"FlowerClipping(noise_multiplier={self.noise_multiplier}) with {cohort} clients: "
                f"the count's noise of {std:g} must exceed half the multiplier; raise count_std, "
                "or take more clients."
            )
        return float((self.noise_multiplier**-2 - (2 * std) ** -2) ** -0.5)

    def _count_std(self, cohort: int) -> float:
        return cohort / 20 if self.count_std is None else self.count_std

    def setup(self, setup: RoundSetup) -> None:
        """Send this round's bound to the clients; it follows from what they said last round."""
        if not self.noise_multiplier:
            return
        server, cohort = setup.server, len(setup.cohort)
        self.multiplier(cohort)
        bound = server.setdefault("bound", self.clipping_norm)
        bits = [m.pop("bit") for m in setup.clients.values() if "bit" in m]
        if self.adaptive and bits:
            noise = torch.randn((), generator=setup.generator, dtype=torch.float64)
            share = (sum(bits) + self._count_std(cohort) * float(noise)) / len(bits)
            bound = self.moved(bound, share)
        server["bound"] = bound
        for memory in setup.clients.values():
            memory["bound"] = bound

    def moved(self, bound: float, share: float) -> float:
        """The next bound, if this share of the clients was clipped."""
        return bound * math.exp(-self.clip_norm_lr * (share - self.target_quantile))

    def update(self, update: Update, context: ClientContext) -> Update:
        """Clip, and note whether that was necessary."""
        if not self.noise_multiplier:
            return update
        # Who rehearses clients has heard no server: it starts where the first round does.
        bound = context.memory.get("bound", self.clipping_norm)
        sent = clip(update.tensors, bound, "flat")
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(t) for t in update.tensors.values()])
        )
        context.memory["bit"] = float(norm > bound)
        return replace(update.with_tensors(sent), buffers_after={})

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Add noise to the mean."""
        mean = combine(messages)
        if not self.noise_multiplier:
            return mean
        cohort = len(context.cohort)
        std = self.multiplier(cohort) * context.server["bound"] / cohort
        noise = gaussian(mean.tensors, std, context.generator)
        return mean.with_tensors({name: t + noise[name] for name, t in mean.tensors.items()})

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's update, scaled to the observed norm if it is longer.

        A single clipped upload shows the bound of its round; of a mean nothing is mirrored.
        """
        del x, y
        if not self.noise_multiplier or observed.clients > 1:
            return update
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(t) for t in observed.tensors.values()])
        )
        return clip(update, float(norm), "flat") if float(norm) else update
