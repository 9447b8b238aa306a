r"""Client-side DP: the client clips and adds noise before anything leaves it.

Wei, Liu, Wu, Su, Iyengar, "Gradient-Leakage Resilient Federated Learning", ICDCS 2021 (Fed-CDP);
printed in the tables as "FedCDP: Client-level Differential Privacy for Federated Learning".
Despite that title its unit is one example. Two units, by ``unit``:

``example``: Fed-CDP, or DP-SGD run by each client. In every local step, per-example gradients
:math:`g_i`, clipped (per tensor or over all of them) and noised:

.. math:: \hat g_i = g_i \min(1, C/\lVert g_i \rVert), \qquad
          \tilde g = \frac1B \Bigl(\sum_i \hat g_i + \mathcal N(0, z^2 C_{joint}^2)\Bigr).

``update``: once per round, :math:`\tilde\Delta = \Delta\min(1, S/\lVert\Delta\rVert)
+ \mathcal N(0, z^2 S^2)`. With ``share_of`` = M every client adds noise of variance
:math:`z^2 S^2/M` only, so that the *sum* of M updates carries :math:`z^2 S^2`: distributed DP, made
for secure aggregation. Whoever sees one client's update, or controls the other M - 1 clients, faces
one share: effective multiplier :math:`z/\sqrt M`.

Per-example gradients come from Opacus (extra ``opacus``) and so do the accountants.

The knob is z alone; at z = 0 the client sends what it would have sent undefended.

Departures:
    L tensors clipped to C each have joint norm :math:`C_{joint} = C\sqrt L`. The paper adds
    N(0, σ²C²) to each, which is an effective multiplier of σ/√L. Here z is what the accountant
    takes and the noise is :math:`zC\sqrt L` (as in Opacus); z = σ/√L gives the paper's noise.
    Batches follow the protocol: fixed sizes, no Poisson sampling. Exact accounting for them is
    ``sampling_rate=1`` with one step per local epoch (an example is in one batch of each).
    While the defense is on, buffers (running statistics) are withheld: they would leave unnoised.
    Noise without clipping, the "DP" baseline of many attack papers, is not offered here: it has
    no guarantee.
    The distributed noise is continuous; after it a client's update may be quantised (secure
    aggregation), whose rounding error the accounting does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from leakatlas.defenses.formal.dp import _accounting
from leakatlas.defenses.formal.dp._accounting import Accountant
from leakatlas.defenses.formal.dp._examples import per_example_gradients
from leakatlas.defenses.formal.dp._mechanism import (
    Clipping,
    clip,
    clipped_sum,
    gaussian,
    joint_bound,
)
from leakatlas.errors import InvalidParameter
from leakatlas.fl import ActsOn, ClientContext, Defense, FedSGD, LocalStep, Memory, Trait, Update
from leakatlas.params import NonNegative, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class ClientDP(Defense):
    """Clipping and Gaussian noise on the client.

    Args:
        noise_multiplier: z, the noise over the joint bound; 0 turns everything off. The paper
            uses 6 (see *Departures*); useful range 0 to 8.
        clip_norm: C (``example``) or S (``update``).
        unit: What one person is: an example of the client, or the client.
        clipping: Bound on all tensors together, or on each.
        share_of: M: the noise of an update is one of M shares; needs ``unit="update"`` and
            clients of equal weight.
        final_clip_norm: Fed-CDP(decay): the bound falls linearly from ``clip_norm`` to this over
            ``decay_rounds`` (the paper: 6 to 2). The noise follows, so epsilon does not change.
        decay_rounds: Rounds after which the bound stays.
    """

    key: ClassVar[str] = "client_dp"
    knob: ClassVar[str] = "noise_multiplier"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.01, 0.1, 1.0, 6.0)
    # Innermost among the local steps (it computes the gradients), and after pruning among updates.
    stage: ClassVar[int] = 60
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE, Trait.EXAMPLE_DP})
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP, ActsOn.PER_UPDATE})

    noise_multiplier: NonNegative = 6.0
    clip_norm: Positive = 4.0
    unit: Literal["example", "update"] = "example"
    clipping: Clipping = "per_layer"
    share_of: PositiveInt = 1
    final_clip_norm: Positive | None = None
    decay_rounds: PositiveInt = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_of > 1 and self.unit == "example":
            raise InvalidParameter(
                f"ClientDP(share_of={self.share_of}): shares of noise are defined on whole "
                "updates; set unit='update'."
            )

    def active_traits(self) -> frozenset[Trait]:
        """Those of the chosen unit; none at z = 0, where the defense does nothing."""
        if not self.noise_multiplier:
            return frozenset()
        return self.traits if self.unit == "example" else frozenset({Trait.DP_NOISE})

    def epsilon(
        self,
        *,
        rounds: int,
        delta: float,
        steps_per_round: int = 1,
        sampling_rate: float = 1.0,
        honest: int | None = None,
        accountant: Accountant = "prv",
    ) -> float:
        """Epsilon per ``unit``, for adding or removing one.

        Args:
            rounds: Rounds in which this client takes part.
            delta: In (0, 1).
            steps_per_round: Noisy releases in a round: 1 for updates and FedSGD. For FedAVG
                examples: the local epochs with ``sampling_rate=1``, or all local steps if batches
                are Poisson samples.
            sampling_rate: Poisson rate of an example in a step, or of a client in a round.
            honest: With ``share_of``: how many clients in the sum really added their share (all
                of them if None; 1 if sybils fill the cohort, or if single updates are seen).
            accountant: Which bound.
        """
        shares = 1.0 if honest is None else honest / self.share_of
        return _accounting.epsilon(
            self.noise_multiplier * math.sqrt(shares),
            steps=rounds * steps_per_round,
            delta=delta,
            sampling_rate=sampling_rate,
            accountant=accountant,
        )

    def bound(self, round: int) -> float:
        """C (or S) in a round."""
        if self.final_clip_norm is None:
            return self.clip_norm
        progress = min(round / self.decay_rounds, 1.0)
        return self.clip_norm + (self.final_clip_norm - self.clip_norm) * progress

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Per-example clipping and noise."""
        if not self.noise_multiplier or self.unit == "update":
            return gradients(step)
        context = step.context
        protocol = context.protocol
        summed = isinstance(protocol, FedSGD) and protocol.reduction == "sum"
        each = per_example_gradients(step, "sum" if summed else "mean")
        bound = self.bound(context.round)
        total = clipped_sum(each, bound, self.clipping)
        std = self.noise_multiplier * joint_bound(bound, self.clipping, len(total))
        noise = gaussian(total, std, context.generator)
        divisor = 1 if summed else len(step.x)
        if isinstance(protocol, FedSGD):
            context.memory["noise"] = {name: n / divisor for name, n in noise.items()}
        return {name: (total[name] + noise[name]) / divisor for name in total}

    def update(self, update: Update, context: ClientContext) -> Update:
        """Withhold buffers; with ``unit="update"``, clip and add this client's noise."""
        if not self.noise_multiplier:
            return update
        update = replace(update, buffers_after={})
        if self.unit == "example":
            return update
        bound = self.bound(context.round)
        clipped = clip(update.tensors, bound, self.clipping)
        std = self.noise_multiplier * joint_bound(bound, self.clipping, len(clipped))
        noise = gaussian(clipped, std / math.sqrt(self.share_of), context.generator)
        context.memory["noise"] = noise
        return update.with_tensors({name: clipped[name] + noise[name] for name in clipped})

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The clipping, without the noise, whose expectation is zero.

        Exact for one client's update, and for the gradient of one example. For larger batches
        the clipped mean is no function of the mean, and the upload is left as it is. A decaying
        bound is taken at its first value.
        """
        del y
        one_example = observed.kind == "gradient" and len(x) == 1
        if not self.noise_multiplier or observed.clients > 1:
            return update
        if self.unit == "example" and not one_example:
            return update
        return clip(update, self.clip_norm, self.clipping)

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The clipping, and the very noise, if it is all there is in the upload."""
        mirrored = self.simulate(update, x, y, observed)
        if observed.clients > 1:
            return mirrored
        return {name: t + secrets[name] for name, t in mirrored.items()}

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The noise drawn last, as it stands in the upload (not under FedAVG with examples)."""
        return dict(memory.get("noise", {}))
