"""Clients, a server, and the rounds they play; everything here belongs to the harness.

A :class:`Federation` holds private data. Adversaries never see it: they get a
:class:`~leakatlas.fl.view.View`, built from the records of the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.errors import InvalidInput, InvalidParameter, ProtocolError
from leakatlas.fl import state
from leakatlas.fl.composition import check_composition, ordered
from leakatlas.fl.draws import Draws
from leakatlas.fl.hooks import ClientContext, Defense, Memory, Message, RoundSetup, ServerContext
from leakatlas.fl.protocol import FedSGD, Protocol
from leakatlas.fl.seeding import stream
from leakatlas.fl.sharing import unshared_names
from leakatlas.fl.tampering import TamperedModel, agreed_part, check_sendable
from leakatlas.fl.training import LocalResult, check_batches, train_locally
from leakatlas.fl.update import Update, average


@dataclass
class Client:
    """One device and its private examples.

    Args:
        x: ``(N, C, H, W)``, model space.
        y: ``(N,)`` class indices.
        private: Values of the parameters that never leave this device.
        memories: What each defense keeps here, by defense key.
    """

    x: Tensor
    y: Tensor
    private: dict[str, Tensor] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundRecord:
    """Everything that happened in one round, private facts included (harness only).

    Args:
        index: Round number.
        cohort: Clients that took part, sybils included.
        sybils: Members of the cohort that the adversary runs.
        received: The model that every client built from what it was sent.
        states: Its state, as each client held it when it began to train (shared part only).
        updates: Every client's update after its own hooks, in the clear.
        messages: What every client put on the wire.
        aggregate: The server's result.
        order: Example indices of every local step, by client.
        draws: What the model drew in every local step (dropout masks), by client.
        augmentation: The seed of every local step's transforms, by client.
        dropped: Clients that vanished before unmasking.
        broadcast: What of the aggregate shows without a client's keys; None if nothing does.
    """

    index: int
    cohort: tuple[int, ...]
    sybils: frozenset[int]
    received: Mapping[int, nn.Module]
    states: Mapping[int, Mapping[str, Tensor]]
    updates: Mapping[int, Update]
    messages: Mapping[int, Message]
    aggregate: Update
    order: Mapping[int, tuple[Tensor, ...]]
    draws: Mapping[int, tuple[Draws, ...]]
    augmentation: Mapping[int, tuple[int, ...]]
    dropped: frozenset[int]
    broadcast: Update | None


class Federation:
    """A server, its global model, and its clients.

    Args:
        model: The undefended architecture with the initial global weights; not changed.
        clients: By id.
        protocol: The learning algorithm.
        defenses: In any order; they act in the order of their stages.
        seed: Of everything random on the clients and the honest server.
        box: Between the pixels that clients transform and model space; none if None.

    Raises:
        IncompatibleDefenses: If the defenses cannot be composed.
        InvalidInput: If a client's data do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[int, Client],
        protocol: Protocol,
        defenses: Sequence[Defense] = (),
        *,
        seed: int = 0,
        box: Box | None = None,
    ) -> None:
        if not clients:
            raise InvalidParameter("A federation needs at least one client.")
        self.base_model = model
        self.protocol = protocol
        self.defenses = ordered(defenses)
        self.clients = dict(clients)
        self.seed = seed
        self.box = box
        self.server_memories: dict[str, Memory] = {d.key: {} for d in self.defenses}
        self.rounds_played = 0
        # Modules that a defense adds are initialised here, out of the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "defended model").initial_seed())
            defended = model
            for defense in self.defenses:
                defended = defense.model(defended)
        self.model = state.load_into(defended, state.model_state(defended))
        check_composition(self.defenses, protocol, self.model)
        self.secret_names = frozenset[str]().union(*(d.private(self.model) for d in self.defenses))
        """Drawn on each client's own device, by a defense."""
        self.private_names = self.secret_names | unshared_names(self.model, protocol.shared)
        """All that never leaves a client."""
        for index, client in self.clients.items():
            self._check_client(index, client)

    def _check_client(self, index: int, client: Client) -> None:
        if len(client.x) == 0 or len(client.x) != len(client.y):
            raise InvalidInput(
                f"Client {index} has {len(client.x)} inputs and {len(client.y)} labels; "
                "expected the same number, at least one."
            )
        if not torch.isfinite(client.x).all():
            raise InvalidInput(f"Client {index}'s inputs hold non-finite values.")
        check_batches(self.model, client.x, self.protocol, f"Client {index}")

    def play_round(
        self,
        *,
        cohort: Sequence[int] | None = None,
        sent: TamperedModel | Mapping[int, TamperedModel] | None = None,
        sybils: Collection[int] = (),
        dropouts: Collection[int] = (),
        apply: bool = False,
    ) -> RoundRecord:
        """Play one round.

        Args:
            cohort: Who takes part; every client if None.
            sent: What a malicious server sends instead of the global model, to all or to each:
                values and edits, from which every client builds its model.
            sybils: Ids of devices that the adversary adds; they send zeros and no noise.
            dropouts: Clients that send their message and vanish before unmasking.
            apply: Whether the global model takes the aggregate, as in training.

        Raises:
            ProtocolError: If a client refuses or too few survive.
            InvalidInput: If a live module is sent, or something that does not fit the model.
        """
        index = self.rounds_played
        self.rounds_played += 1
        sybils = frozenset(sybils)
        members = tuple(cohort if cohort is not None else sorted(self.clients))
        members += tuple(s for s in sorted(sybils) if s not in members)
        unknown = [m for m in members if m not in self.clients and m not in sybils]
        if unknown:
            raise ProtocolError(f"Round {index}: client {unknown[0]} does not exist.")
        honest = [m for m in members if m not in sybils]
        if not honest:
            raise ProtocolError(f"Round {index} has no honest client.")
        sybil_memories: dict[int, dict[str, Memory]] = {
            s: {d.key: {} for d in self.defenses} for s in sybils
        }

        def memory(member: int, defense: Defense) -> Memory:
            if member in sybils:
                return sybil_memories[member][defense.key]
            return self.clients[member].memories.setdefault(defense.key, {})

        setups = {d.key: self._setup(d, index, members, memory) for d in self.defenses}
        for defense in self.defenses:
            defense.setup(setups[defense.key])

        received: dict[int, nn.Module] = {}
        states: dict[int, Mapping[str, Tensor]] = {}
        updates: dict[int, Update] = {}
        contexts: dict[int, list[ClientContext]] = {}
        order: dict[int, tuple[Tensor, ...]] = {}
        drawn: dict[int, tuple[Draws, ...]] = {}
        seeds: dict[int, tuple[int, ...]] = {}
        for member in honest:
            model = self._sent_to(member, sent)
            received[member] = model
            updates[member], states[member], result, contexts[member] = self._client_round(
                member, model, index, memory
            )
            order[member], drawn[member] = result.order, result.draws
            seeds[member] = result.augmentation
        template = updates[honest[0]]
        for member in sorted(sybils):
            updates[member] = replace(
                template,
                # One shared zero each: a thousand sybils must not cost a thousand models.
                tensors={n: t.new_zeros(()).expand(t.shape) for n, t in template.tensors.items()},
            )
            contexts[member] = [self._context(member, d, index, memory) for d in self.defenses]
        for defense in self.defenses:
            updates = dict(defense.peer(updates, setups[defense.key]))
        messages = {
            member: self._message(member, update, contexts[member])
            for member, update in updates.items()
        }
        aggregate = self._aggregate(messages, index, members, frozenset(dropouts))
        if apply:
            self.apply(aggregate)
        return RoundRecord(
            index, members, sybils, received, states, updates, messages, aggregate, order,
            drawn, seeds, frozenset(dropouts), self._broadcast(aggregate, index, members),
        )  # fmt: skip

    def apply(self, aggregate: Update) -> None:
        """Move the global model by an aggregate, as an honest server does."""
        quantity = aggregate.quantity()
        factor = -self.protocol.lr if isinstance(self.protocol, FedSGD) else 1.0
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in quantity:
                    parameter.add_(factor * quantity[name])
            for name, buffer in self.model.named_buffers():
                if name in aggregate.buffers_after:
                    buffer.copy_(aggregate.buffers_after[name])

    def evaluation_model(self, client: int) -> nn.Module:
        """The model that this client predicts with, its private parameters in place."""
        model = self._with_private(self.model, client)
        for defense in self.defenses:
            memory = self.clients[client].memories.get(defense.key, {})
            model = defense.evaluate(model, memory)
        return model.eval()

    # -- the parts of a round ------------------------------------------------------------------

    def _setup(
        self,
        defense: Defense,
        index: int,
        members: tuple[int, ...],
        memory: Callable[[int, Defense], Memory],
    ) -> RoundSetup:
        return RoundSetup(
            index,
            members,
            {m: memory(m, defense) for m in members},
            self.server_memories[defense.key],
            self.protocol,
            stream(self.seed, "setup", defense.key, index),
            simulated=True,
        )

    def _sent_to(
        self, member: int, sent: TamperedModel | Mapping[int, TamperedModel] | None
    ) -> nn.Module:
        """The model of this round, built on the client's side with its private parameters."""
        model = self._with_private(self.model, member)
        tampered = sent.get(member) if isinstance(sent, Mapping) else sent
        if tampered is None:
            return model
        check_sendable(tampered)
        pixels = self.clients[member].x[0].numel()
        return tampered.build(model, pixels=pixels, private=self.private_names)

    def _with_private(self, model: nn.Module, member: int) -> nn.Module:
        held = state.model_state(model)
        own = self.clients[member].private
        if self.private_names and not own:
            own.update(self._private_start(member))
        for name in self.private_names & held.keys():
            held[name] = own[name]
        return state.load_into(model, held)

    def _private_start(self, member: int) -> dict[str, Tensor]:
        """What a client draws on its own device: not the public values that everyone knows."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(self.seed, "private", member).initial_seed())
            own = self.base_model
            for defense in self.defenses:
                own = defense.model(own)
        drawn = state.model_state(own)
        # What merely stays on the client begins as it was handed out to everybody.
        handed_out = state.model_state(self.model)
        return {
            name: (drawn if name in self.secret_names else handed_out)[name]
            for name in sorted(self.private_names)
        }

    def _context(
        self,
        member: int,
        defense: Defense,
        index: int,
        memory: Callable[[int, Defense], Memory],
    ) -> ClientContext:
        client = self.clients.get(member)
        empty = torch.empty(0)
        return ClientContext(
            member,
            index,
            self.model,
            client.x if client else empty,
            client.y if client else empty,
            self.protocol,
            stream(self.seed, "client", member, defense.key, index),
            memory(member, defense),
        )

    def _client_round(
        self,
        member: int,
        model: nn.Module,
        index: int,
        memory: Callable[[int, Defense], Memory],
    ) -> tuple[Update, Mapping[str, Tensor], LocalResult, list[ClientContext]]:
        client = self.clients[member]
        contexts = [self._context(member, d, index, memory) for d in self.defenses]
        working = state.load_into(model, state.model_state(model))
        prefix, _ = agreed_part(model)
        private = {f"{prefix}{name}": name for name in self.private_names}
        shared = {n: t for n, t in state.model_state(model).items() if n not in private}
        parameter_names = {name for name, _ in model.named_parameters()}
        result = train_locally(
            working,
            client.x,
            client.y,
            self.protocol,
            defenses=self.defenses,
            contexts=contexts,
            generator=stream(self.seed, "training", member, index),
            box=self.box,
        )
        moved = state.trained(working)
        for held, name in private.items():
            if held in moved:
                change = -self.protocol.lr * result.tensors[held]
                client.private[name] = (
                    (client.private[name] + change)
                    if isinstance(self.protocol, FedSGD)
                    else moved[held].detach().clone()
                )
            elif held in result.buffers_after:
                client.private[name] = result.buffers_after[held].clone()
        update = Update(
            tensors={n: t for n, t in result.tensors.items() if n not in private},
            kind="gradient" if isinstance(self.protocol, FedSGD) else "delta",
            state_hash=state.state_hash(shared),
            num_examples=len(client.x),
            reduction=self.protocol.reduction if isinstance(self.protocol, FedSGD) else "mean",
            buffers_before={n: t for n, t in shared.items() if n not in parameter_names},
            # A buffer that only appeared while training is none that was agreed on.
            buffers_after={n: t for n, t in result.buffers_after.items() if n in shared},
        )
        for defense, context in zip(self.defenses, contexts, strict=True):
            update = defense.update(update, context)
        return update, shared, result, contexts

    def _message(self, member: int, update: Update, contexts: Sequence[ClientContext]) -> Message:
        message = Message(client=member, num_examples=update.num_examples, update=update)
        for defense, context in zip(self.defenses, contexts, strict=True):
            message = defense.wire(message, context)
        return message

    def _aggregate(
        self,
        messages: Mapping[int, Message],
        index: int,
        members: Sequence[int],
        dropouts: frozenset[int],
    ) -> Update:
        def plain(kept: Mapping[int, Message]) -> Update:
            clear = {c: m.update for c, m in kept.items() if m.update is not None}
            if len(clear) != len(kept):
                raise ProtocolError("The server cannot average encoded messages.")
            return average(clear)

        combine: Callable[[Mapping[int, Message]], Update] = plain
        for defense in self.defenses:
            combine = _aggregating(defense, combine, self._server_context(defense, index, members))
        survivors = {c: m for c, m in messages.items() if c not in dropouts}
        if not survivors:
            raise ProtocolError(f"Round {index}: every client dropped out.")
        return combine(survivors)

    def _broadcast(self, aggregate: Update, index: int, members: Sequence[int]) -> Update | None:
        seen: Update | None = aggregate
        for defense in self.defenses:
            if seen is not None:
                seen = defense.broadcast(seen, self._server_context(defense, index, members))
        return seen

    def _server_context(
        self, defense: Defense, index: int, members: Sequence[int]
    ) -> ServerContext:
        return ServerContext(
            index,
            members,
            self.server_memories[defense.key],
            self.protocol,
            stream(self.seed, "server", defense.key, index),
        )


def _aggregating(
    defense: Defense, inner: Callable[[Mapping[int, Message]], Update], context: ServerContext
) -> Callable[[Mapping[int, Message]], Update]:
    return lambda messages: defense.aggregate(messages, inner, context)


def uniform_cohort(
    clients: Collection[int], size: int, generator: torch.Generator
) -> tuple[int, ...]:
    """``size`` different clients, every subset equally likely.

    Raises:
        InvalidParameter: If there are fewer clients.
    """
    if not 0 < size <= len(clients):
        raise InvalidParameter(f"A cohort of {size} cannot be drawn from {len(clients)} clients.")
    order = sorted(clients)
    drawn = torch.randperm(len(order), generator=generator)[:size].tolist()
    return tuple(sorted(order[i] for i in drawn))


def poisson_cohort(
    clients: Collection[int], rate: float, generator: torch.Generator
) -> tuple[int, ...]:
    """Every client independently with probability ``rate``, as DP accounting assumes.

    The cohort may be empty; such a round is not played, but it counts for the accountant.

    Raises:
        InvalidParameter: If ``rate`` is outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise InvalidParameter(f"A sampling rate lies in (0, 1], got {rate}.")
    order = sorted(clients)
    drawn = torch.rand(len(order), generator=generator, dtype=torch.float64) < rate
    return tuple(client for client, taken in zip(order, drawn.tolist(), strict=True) if taken)
