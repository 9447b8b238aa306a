r"""Central DP: clip every client's update, average, and let the server add the noise.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models",
ICLR 2018. The unit that is protected is one client with all its examples.

1. Clip: :math:`\Delta_k \leftarrow \Delta_k \min(1, S/\lVert\Delta_k\rVert)`, over all tensors
   (``flat``) or each tensor to S (``per_layer``; jointly :math:`S\sqrt L` for L tensors).
2. Weigh: :math:`w_k = \min(n_k/\hat w, 1)`.
3. Average, with the expected weight qW of a round, fixed before it:

   .. math:: \bar\Delta_f = \frac{\sum w_k \Delta_k}{qW}, \quad \text{sensitivity } \frac{S}{qW};
             \qquad
             \bar\Delta_c = \frac{\sum w_k \Delta_k}{\max(qW, \sum w_k)},
             \quad \text{sensitivity } \frac{2S}{qW}.

   Without an expected weight, the denominator is the realised sum, which moves with who takes part:
   a client of weight w moves the average by :math:`w \lVert \Delta_k - \bar\Delta_{-k} \rVert
   / \sum w`, so the sensitivity is :math:`2S / \sum w`, for a client that leaves or is replaced.

4. Publish :math:`\bar\Delta + \mathcal N(0, z^2\, \text{sensitivity}^2)` per coordinate.

Who is protected depends on where the adversary looks. The noise exists in the aggregate only: at
the vantages ``wire`` and ``server`` the update is in the clear (clipped, if the client clips). A
malicious server adds no noise.

The knob is z alone, so at z = 0 nothing is clipped either: a bound without noise is no differential
privacy but the row ``clipping``.

Departures:
    Clients are sampled by whoever plays the rounds. The accounting of ``epsilon`` holds for
    Poisson sampling; for fixed cohorts use ``sampling_rate=1``.
    Buffers (running statistics of normalisation layers) are data as well and would be published
    without noise; while the defense is on they are withheld from the aggregate.
    Without an expected weight, the size of the noise tells the sum of weights, which the accounting
    takes to be public.
    A sum-reduced gradient has weight 1 whatever its number of examples, as without the defense.
    Not composable with secure aggregation: capped weights need each client's update.
    Noise is drawn in floating point; attacks on its low-order bits are out of scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from leakatlas.defenses.formal.dp import _accounting
from leakatlas.defenses.formal.dp._accounting import Accountant
from leakatlas.defenses.formal.dp._mechanism import Clipping, clip, gaussian, joint_bound
from leakatlas.errors import ProtocolError
from leakatlas.fl import ClientContext, Defense, Message, ServerContext, Trait, Update
from leakatlas.params import NonNegative, Positive, PositiveInt

Estimator = Literal["fixed", "ratio"]


@dataclass(frozen=True, kw_only=True)
class CentralDP(Defense):
    """Clipped client updates, Gaussian noise on their average.

    Args:
        noise_multiplier: z, the noise over the sensitivity; 0 turns everything off. Useful
            range 0 to 4.
        clip_norm: S, in units of the upload (a gradient under FedSGD, a weight difference under
            FedAVG); the paper sets it near the median norm.
        clipping: All tensors together, or each tensor to S.
        clip_at: Who clips. A client that does not clip breaks ``client``; ``server`` reads every
            update.
        estimator: Fixed denominator or ratio.
        expected_weight: qW: expected sum of weights of a round (for ``ratio``, its assumed
            minimum). None takes the sum of the cohort at hand and twice the noise.
        weight_cap: w-hat in examples; with 1 every client has weight 1.
    """

    key: ClassVar[str] = "central_dp"
    version: ClassVar[int] = 2
    knob: ClassVar[str] = "noise_multiplier"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0)
    # After everything else on the client, so that no later step can push a norm past the bound.
    stage: ClassVar[int] = 80
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.DP_NOISE, Trait.READS_UPDATES})

    noise_multiplier: NonNegative = 1.0
    clip_norm: Positive = 1.0
    clipping: Clipping = "flat"
    clip_at: Literal["client", "server"] = "client"
    estimator: Estimator = "fixed"
    expected_weight: Positive | None = None
    weight_cap: PositiveInt = 1

    def active_traits(self) -> frozenset[Trait]:
        """None at z = 0, where the defense does nothing."""
        return self.traits if self.noise_multiplier else frozenset()

    def epsilon(
        self,
        *,
        rounds: int,
        sampling_rate: float,
        delta: float,
        accountant: Accountant = "prv",
    ) -> float:
        """User-level epsilon of the sequence of aggregates, for adding or removing one client.

        Args:
            rounds: T.
            sampling_rate: Probability q with which a client joins a round (Poisson sampling).
            delta: In (0, 1).
            accountant: Which bound.
        """
        return _accounting.epsilon(
            self.noise_multiplier,
            steps=rounds,
            delta=delta,
            sampling_rate=sampling_rate,
            accountant=accountant,
        )

    def update(self, update: Update, context: ClientContext) -> Update:
        """Step 1, if the client clips."""
        del context
        if not self.noise_multiplier or self.clip_at == "server":
            return update
        return update.with_tensors(clip(update.tensors, self.clip_norm, self.clipping))

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Steps 1 (if the server clips) to 4."""
        if not self.noise_multiplier:
            return combine(messages)
        updates: dict[int, Update] = {}
        for client, message in messages.items():
            if message.update is None:
                raise ProtocolError(
                    f"central_dp cannot weigh client {client}'s update, which "
                    f"{message.encoded_by} encodes; use client_dp(unit='update') instead."
                )
            updates[client] = message.update
        if self.clip_at == "server":
            updates = {
                c: u.with_tensors(clip(u.tensors, self.clip_norm, self.clipping))
                for c, u in updates.items()
            }
        # combine() weighs by num_examples: capping them there gives sum(w Δ) / sum(w).
        mean = combine(
            {
                client: replace(
                    messages[client],
                    update=replace(
                        update,
                        num_examples=min(update.num_examples, self.weight_cap),
                        buffers_after={},
                    ),
                )
                for client, update in updates.items()
            }
        )
        total = sum(weight(update, self.weight_cap) for update in updates.values())
        expected = total if self.expected_weight is None else self.expected_weight
        fixed = self.estimator == "fixed" and self.expected_weight is not None
        denominator = expected if fixed else max(expected, total)
        tensors = {name: t * (total / denominator) for name, t in mean.tensors.items()}
        bound = joint_bound(self.clip_norm, self.clipping, len(tensors))
        std = self.noise_multiplier * sensitivity(bound, expected, "fixed" if fixed else "ratio")
        noise = gaussian(tensors, std, context.generator)
        return replace(
            mean,
            tensors={name: t + noise[name] for name, t in tensors.items()},
            num_examples=sum(update.num_examples for update in updates.values()),
        )

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The client's clipping, when one client's upload is what was observed."""
        del x, y
        if not self.noise_multiplier or self.clip_at == "server" or observed.clients > 1:
            return update
        return clip(update, self.clip_norm, self.clipping)


def weight(update: Update, cap: int) -> float:
    """Step 2: w = min(n / cap, 1); 1 for a sum-reduced gradient."""
    return min(update.num_examples / cap, 1.0) if update.reduction == "mean" else 1.0


def sensitivity(bound: float, expected_weight: float, estimator: Estimator) -> float:
    """Largest move of the average when one client of norm ``bound`` joins or leaves (step 3).

    A denominator that is not fixed before the round counts as a ratio.
    """
    return (1.0 if estimator == "fixed" else 2.0) * bound / expected_weight
