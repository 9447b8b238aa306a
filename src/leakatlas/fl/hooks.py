"""The nine places of a federated round at which a defense may act.

=============  ==============  ====================================================
hook           where           signature in words
=============  ==============  ====================================================
``setup``      both            before a round: keys, calibration, private weights
``model``      client          architecture -> architecture (+ which parameters stay private)
``batch``      client          (x, y) -> (x', y'); may change the batch size, or refuse the round
``local_step`` client          owns loss, per-example gradients, clipping and noise of one step
``update``     client          update -> update
``peer``       client-client   exchange of fragments between clients
``wire``       client          update -> the message an eavesdropper sees
``aggregate``  server          messages -> one update
``evaluate``   client          the model to predict with, private modules present
=============  ==============  ====================================================
"""

from __future__ import annotations

import enum
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.fl.protocol import FedAVG, Protocol
from leakatlas.fl.update import Update
from leakatlas.params import Configured

Memory = dict[str, Any]
"""What one defense remembers on one client, or on the server."""


@dataclass
class ClientContext:
    """What a hook may use on the client's side.

    Args:
        client: Client id.
        round: Round index.
        model: The model being trained locally.
        x: The batch of the last local step, model space ``(N, C, H, W)``.
        y: Its labels.
        protocol: The learning algorithm.
        generator: This client's and this defense's own random stream.
        memory: What this defense keeps on this client between rounds.
        box: Between pixels in [0, 1] and model space; the same if None.
    """

    client: int
    round: int
    model: nn.Module
    x: Tensor
    y: Tensor
    protocol: Protocol
    generator: torch.Generator
    memory: Memory
    box: Box | None = None

    def change_unit(self, update: Update) -> float:
        """What a change of 1 per local step, of any weight, is in an update, without a sign.

        A gradient stands for the change that one step of the protocol's rate makes of it.
        """
        if isinstance(self.protocol, FedAVG):
            return update.scale * self.protocol.steps(update.num_examples)
        return update.scale / self.protocol.lr


@dataclass
class LocalStep:
    """One local step: compute a gradient of ``loss`` at ``model`` on ``(x, y)``.

    Args:
        model: The model, in the protocol's mode, holding the current weights.
        x: ``(B, C, H, W)``, model space.
        y: ``(B,)`` labels or ``(B, K)`` probabilities.
        loss: ``(logits, y) -> scalar``.
        index: Running index of the step within the round.
        context: The client's side.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    index: int
    context: ClientContext


@dataclass
class RoundSetup:
    """What the ``setup`` and ``peer`` hooks see: who takes part, and both sides' memories.

    ``simulated`` says that nobody's real data are at stake, so that secrets may come from a seed.
    """

    round: int
    cohort: Sequence[int]
    clients: Mapping[int, Memory]
    server: Memory
    protocol: Protocol
    generator: torch.Generator
    simulated: bool = False


@dataclass
class ServerContext:
    """What the ``aggregate`` hook sees."""

    round: int
    cohort: Sequence[int]
    server: Memory
    protocol: Protocol
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class Message:
    """What leaves a client.

    Args:
        client: Client id.
        num_examples: Aggregation weight, in the clear unless the defense hides it.
        update: The update in the clear, or None once it is encoded.
        payload: The encoded tensors, if any.
        encoded_by: Key of the defense that encoded it.
    """

    client: int
    num_examples: int
    update: Update | None
    payload: Mapping[str, Tensor] = field(default_factory=dict)
    encoded_by: str | None = None


class Trait(enum.Enum):
    """Properties that decide which defenses may be composed."""

    DP_NOISE = enum.auto()
    """Adds noise calibrated to a sensitivity."""
    EXAMPLE_DP = enum.auto()
    """Needs per-example gradients: no module may mix examples."""
    ERROR_FEEDBACK = enum.auto()
    """Keeps unprotected residuals and sends them later."""
    HIDES_UPDATES = enum.auto()
    """The server cannot read one client's update."""
    SHOWS_PART = enum.auto()
    """But it sees some entries of each in the clear."""
    READS_UPDATES = enum.auto()
    """The server must read (clip, score, filter) each client's update."""
    READS_BATCH = enum.auto()
    """Its update hook looks at the private batch again."""
    ONLY_REFUSES = enum.auto()
    """Its batch hook passes the batch on unchanged, or refuses the round."""


class ActsOn(enum.Enum):
    """What a defense is defined on."""

    PER_STEP = enum.auto()
    """Every local step: FedSGD's one step, or each step of FedAVG."""
    PER_UPDATE = enum.auto()
    """The upload as a whole: a FedSGD gradient or a FedAVG delta."""
    SINGLE_BATCH = enum.auto()
    """The gradient of one batch only: FedSGD, not FedAVG."""


@dataclass(frozen=True, kw_only=True)
class Defense(Configured, ABC):
    """A frozen configuration with exactly one privacy knob; override the hooks it acts at.

    At the neutral knob value the upload equals the undefended one bitwise. Hooks never change
    their inputs in place.
    """

    key: ClassVar[str]
    """Catalogue key; equals the module's name."""
    knob: ClassVar[str]
    """Name of the field that trades privacy against utility."""
    neutral: ClassVar[Any]
    """The knob's value at which nothing is defended."""
    strengths: ClassVar[tuple[Any, ...]] = ()
    """Values of the knob that are worth trying where none is given, weakest first: published ones,
    and those that users of the mechanism choose. The default is among them."""
    version: ClassVar[int] = 1
    """Raised whenever results may change."""
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP, ActsOn.PER_UPDATE})
    """What it is defined on; anything else is refused, never approximated."""
    traits: ClassVar[frozenset[Trait]] = frozenset()
    stage: ClassVar[int] = 50
    """Order on the client within a hook: data 10, model 20, local step 30, clip 40, sparsify 50,
    noise 60, quantise 70, encode 90."""

    def active_traits(self) -> frozenset[Trait]:
        """The traits under the present parameters."""
        return self.traits

    def workload(self, model: nn.Module) -> float:
        """About how many gradients of the loss a client's round costs under this defense.

        Planners ask before they play a round, which nobody can end half-way.
        """
        return 1.0

    def setup(self, setup: RoundSetup) -> None:
        """Prepare a round (keys, calibration)."""

    def model(self, model: nn.Module) -> nn.Module:
        """The defended architecture, built once; ``model`` itself is not changed."""
        return model

    def private(self, model: nn.Module) -> frozenset[str]:
        """Names of parameters and buffers of the defended model that never leave the client."""
        return frozenset()

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """Change a local batch; raise ProtocolError to refuse the round."""
        return x, y

    def local_step(
        self, step: LocalStep, gradients: Callable[[LocalStep], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The gradient of one local step; ``gradients`` is the step without this defense."""
        return gradients(step)

    def update(self, update: Update, context: ClientContext) -> Update:
        """Change the update before it leaves the client."""
        return update

    def peer(self, updates: Mapping[int, Update], setup: RoundSetup) -> Mapping[int, Update]:
        """Exchange fragments between clients."""
        return updates

    def wire(self, message: Message, context: ClientContext) -> Message:
        """Encode, mask or encrypt: what an eavesdropper on the wire sees."""
        return message

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Decode and combine; ``combine`` is the aggregation without this defense."""
        return combine(messages)

    def broadcast(self, aggregate: Update, context: ServerContext) -> Update | None:
        """What of the aggregate those see who hold no client's keys; None if nothing."""
        return aggregate

    def members_read(self, message: Message, memory: Memory) -> Update | None:
        """What of a client's message a colluding member of its cohort reads, beyond what shows.

        ``memory`` is that of the message's own client. None if it is no more than anybody reads.
        """
        return None

    def evaluate(self, model: nn.Module, memory: Memory) -> nn.Module:
        """The model this client predicts with."""
        return model

    # -- what an informed adversary may do with the mechanism ---------------------------------

    def simulate_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable mirror of ``batch``, without the client's secrets."""
        return x, y

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """Differentiable mirror of ``update``: what the defense makes of a simulated upload.

        Args:
            update: Simulated upload, in the units of ``observed``.
            x: Candidate inputs behind it.
            y: Candidate labels behind it.
            observed: The real upload, from which positions, norms or scales may be estimated.
        """
        return update

    def simulate_batch_knowing(
        self, x: Tensor, y: Tensor, secrets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """:meth:`simulate_batch` with what :meth:`secrets` handed over."""
        return self.simulate_batch(x, y)

    def simulate_knowing(
        self,
        update: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        observed: Update,
        secrets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """:meth:`simulate` with what :meth:`secrets` handed over: at the truth, the observation."""
        return self.simulate(update, x, y, observed)

    def simulate_loss(self, loss: Tensor, model: nn.Module) -> Tensor:
        """Differentiable mirror of a changed training loss (a KL term, say)."""
        return loss

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """What ``Grant.DEFENSE_SECRETS`` hands over, from one client's memory."""
        return {}


def acts_at(defense: Defense) -> tuple[str, ...]:
    """The hooks that this defense overrides, in the order of a round."""
    hooks = (
        "setup", "model", "batch", "local_step", "update", "peer", "wire", "aggregate", "evaluate",
    )  # fmt: skip
    return tuple(h for h in hooks if getattr(type(defense), h) is not getattr(Defense, h))
