r"""Flower's ``LocalDpMod``: clip a client's change and add Gaussian noise, every round anew.

As shipped in Flower 1.42 (``flwr.clientapp.mod``). The change of all arrays together is scaled to
norm C at most, and every number gets

.. math:: \mathcal N(0, \sigma^2), \qquad
          \sigma = \frac{s \sqrt{2 \ln(1.25 / \delta)}}{\varepsilon} .

That is the classical Gaussian mechanism, proven for epsilon below 1, a sensitivity s of at least 2C
(two changes of norm C may be 2C apart), and one release; nothing adds rounds up. :meth:`worth` is
what the noise really gives, by the exact curve of the Gaussian mechanism.

What an adversary does about it: the clipping is a factor, the noise has a mean of zero.

Departures:
    * Flower has no defaults for its four arguments; these are ours.
    * The mod clips whatever is in the model's state, buffers too. Here it is the parameters, and
      buffers are withheld: in the clear they would say what the noise hides. (Integer counters
      among them make the mod fail: numpy refuses to scale them in place.)
    * A FedSGD upload is a gradient, and is what is clipped.
    * At epsilon = infinity the mod would still clip; here it is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from leakatlas.defenses.formal.dp import _accounting
from leakatlas.defenses.formal.dp._mechanism import clip, gaussian
from leakatlas.fl import ActsOn, ClientContext, Defense, Memory, Trait, Update
from leakatlas.params import NonNegative, OpenFraction, Positive, PositiveOrInf


@dataclass(frozen=True, kw_only=True)
class LocalDpMod(Defense):
    """Clips a whole update and adds the noise of the classical Gaussian mechanism.

    Args:
        epsilon: As it is promised for one round; infinity turns it off.
        clipping_norm: C.
        sensitivity: s, by which the noise is scaled; nothing ties it to C.
        delta: As it is promised for one round.
    """

    key: ClassVar[str] = "local_dp_mod"
    knob: ClassVar[str] = "epsilon"
    neutral: ClassVar[float] = float("inf")
    strengths: ClassVar[tuple[float, ...]] = (100.0, 10.0, 1.0)
    stage: ClassVar[int] = 60
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_UPDATE})
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE})

    epsilon: PositiveOrInf = 1.0
    clipping_norm: Positive = 1.0
    sensitivity: NonNegative = 1.0
    delta: OpenFraction = 1e-5

    def active_traits(self) -> frozenset[Trait]:
        """None while it is off."""
        return self.traits if self.epsilon != float("inf") else frozenset()

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on every number."""
        return self.sensitivity * math.sqrt(2 * math.log(1.25 / self.delta)) / self.epsilon

    def worth(self, *, rounds: int = 1, delta: float | None = None) -> float:
        """The epsilon that the noise gives over so many rounds, any two changes being neighbours.

        Args:
            rounds: In which one client takes part.
            delta: Its own if None.
        """
        return _accounting.epsilon(
            self.sigma / (2 * self.clipping_norm), steps=rounds, delta=delta or self.delta
        )

    def update(self, update: Update, context: ClientContext) -> Update:
        """Clip, and add this round's noise."""
        if self.epsilon == float("inf"):
            return update
        clipped = clip(update.tensors, self.clipping_norm, "flat")
        noise = gaussian(clipped, self.sigma, context.generator)
        context.memory["noise"] = noise
        sent = {name: t + noise[name] for name, t in clipped.items()}
        return replace(update.with_tensors(sent), buffers_after={})

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The clipping, without the noise, whose expectation is zero."""
        del x, y
        if self.epsilon == float("inf") or observed.clients > 1:
            return update
        return clip(update, self.clipping_norm, "flat")

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The clipping and the very noise."""
        mirrored = self.simulate(update, x, y, observed)
        if observed.clients > 1:
            return mirrored
        return {name: t + secrets[name] for name, t in mirrored.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise drawn last."""
        return dict(memory.get("noise", {}))
