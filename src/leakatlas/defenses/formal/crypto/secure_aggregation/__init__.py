r"""Secure aggregation: pairwise masks that cancel in the sum.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(the protocol); Mansouri, Önen, Ben Jaballah, Conti, "SoK: Secure Aggregation Based on
Cryptographic Schemes for Federated Learning", PETS 2023 (the survey). This runs the protocol; it
is not a plain sum under another name.

Ring :math:`\mathbb Z_R`, R a power of two; cohort of n clients; threshold t.

1. *Advertise* (hook ``setup``): each client u publishes two X25519 keys.
2. *Share* (``peer``): u draws a seed :math:`b_u`, Shamir-shares it and its mask key t-of-n, and
   sends the shares sealed through the server.
3. *Masked input* (``wire``): values are clipped to [-c, c], rounded stochastically to Q steps and
   multiplied by the integer weight :math:`n_k`; :math:`n_k` itself is appended. u sends

   .. math:: y_u = x_u + \mathrm{PRG}(b_u) + \sum_{v>u} \mathrm{PRG}(s_{uv})
             - \sum_{v<u} \mathrm{PRG}(s_{uv}) \pmod R.

4. *Unmask* (``aggregate``): survivors reveal shares of :math:`b_u` for survivors and of the mask
   key for those who dropped out, never both of anyone. The server gets the sum, exactly.

With ``signed`` the keys carry Ed25519 signatures, and survivors sign the list of survivors before
they reveal anything, so that a server can neither stand between two clients nor tell two halves
of the cohort different lists. A signature binds session, round, cohort, threshold and the keys of
all members; a device confirms and answers one list a round, and only one that it is on.

**What collusion opens.** A server with c of the n clients on its side, threshold t:

* c >= t: their own shares give both secrets of everyone, hence every input.
* c < t: from an opened sum it subtracts its own inputs; what is left is a sum over at least t - c
  honest clients, a single one at c = t - 1.
* Two lists of survivors, of which one has client u and the other has not, give both secrets of u.
  Each takes t answers, c of which come from its own side and the others from different clients, as
  an honest one answers a single list: 2 (t - c) <= n - c, so c >= 2t - n. A server alone (c = 0)
  needs t <= n/2. Among n = 9, t = 5 falls to one corrupted client, t = 7 to five.
* Without signatures the server may also stand in for members towards each other (it *is* their
  letters' other end), and learns the shares that were meant for them: alone it counts as c = n - 1.

Signed mode therefore takes t >= floor(2n/3) + 1, with which 2t - n > n/3: fewer than a third of
the clients cannot help the server. ``least_cohort`` and ``threshold`` are also what every client
insists on, whatever the server plans.

**Knob.** What hides a client is the crowd, and the size of the cohort belongs to the scenario. The
defense's own share in it is ``threshold``: how much of the cohort must survive before a sum is
opened, and equally how many must collude to open a single input. A higher threshold hides better
and loses more rounds to dropouts. At 0 nobody is needed to open an input, so nothing is hidden:
the updates travel in the clear, bit for bit as without the defense. A cohort of one hides nothing
either: its sum is its lone input, quantised.

What the server keeps of a round is in its memory: public keys, sealed letters, masked vectors, the
opened secrets and nothing that opens a single input.

Departures:
    Every key is drawn afresh in every round, the mask keys too.
    In a simulation everything random derives from the scenario's seed, so that a round can be
    replayed. That is no protection: who knows the seed opens every input, and two runs of one seed
    are a two-time pad. Outside of simulations it is refused. With ``entropy="system"`` keys come
    from the operating system, and the wire differs in every run (the aggregate does not). The masks
    are ChaCha20 keystreams in both cases.
    A client publishes a hash of its seed beside its keys, so that a wrong share of it is noticed.
    Weights are integers, n_k, and multiply *after* rounding, so the error of the mean is below one
    step 2c/Q however many examples the clients have. Flower scales by n_k / max_weight before it
    rounds, where clients with few examples lose precision. Defaults c = 8, R = 2^32 and
    max_examples = 1000 are Flower's; Q is the largest that fits instead of its 2^22.
    A client that vanishes after it sent y_u counts as dropped, and its late y_u stays masked by
    PRG(b_u).
    Floating-point buffers (running statistics) are masked too, as moves from the broadcast;
    integer counters stay as broadcast, since they would tell n_k.
    The complete graph only; no k-regular one (SecAgg+).
    Client and server run in one process: the server holds a line to each device between ``setup``
    and ``aggregate``, which stands for the network, and gives it up with the round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from leakatlas.defenses.formal.crypto._header import Header
from leakatlas.defenses.formal.crypto.secure_aggregation import _masking, _quantization
from leakatlas.defenses.formal.crypto.secure_aggregation._device import Device
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring
from leakatlas.defenses.formal.crypto.secure_aggregation._opening import (
    common_header,
    open_secrets,
    remove_masks,
    sum_words,
)
from leakatlas.defenses.formal.crypto.secure_aggregation._plan import Plan, Terms
from leakatlas.errors import InvalidParameter, ProtocolError
from leakatlas.fl import (
    ClientContext,
    Defense,
    Memory,
    Message,
    RoundSetup,
    ServerContext,
    Trait,
    Update,
)
from leakatlas.params import Fraction, Positive, PositiveInt

SESSION = 16
"""Bytes of a session's name."""


@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Defense):
    """Masked uploads, of which the server learns the sum over the survivors.

    Args:
        threshold: t/n; 0 turns the defense off. Above 1/2 no server can collect both secrets of
            a client by asking different clients for different ones. ``signed`` takes 2/3 at least,
            and then t is at least floor(2n/3) + 1.
        clip_range: c: values are clipped to [-c, c] before they are rounded.
        levels: Q, steps of the rounding; None takes as many as the ring holds.
        ring_bits: R = 2^ring_bits; 64 doubles the traffic and keeps float precision.
        max_examples: Largest n_k; public, and refused above.
        signed: Signed keys and confirmed survivor lists, against a malicious server.
        entropy: Where keys come from; ``seed`` is for simulations, and refused elsewhere.
        least_cohort: Fewest members that a client joins; a sum over one is its input.
    """

    key: ClassVar[str] = "secure_aggregation"
    version: ClassVar[int] = 2
    knob: ClassVar[str] = "threshold"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.6666666666666666,)
    stage: ClassVar[int] = 90
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.HIDES_UPDATES})

    threshold: Fraction = 2 / 3
    clip_range: Positive = 8.0
    levels: PositiveInt | None = None
    ring_bits: Literal[32, 64] = 32
    max_examples: PositiveInt = 1000
    signed: bool = False
    entropy: Literal["seed", "system"] = "seed"
    least_cohort: PositiveInt = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signed and 0 < self.threshold < 2 / 3:
            raise InvalidParameter(
                f"SecureAggregation(signed=True, threshold={self.threshold}): with a corrupted "
                "client or a few, a server gets two lists of survivors confirmed and opens single "
                "inputs; signed mode takes a threshold of at least 2/3."
            )

    def active_traits(self) -> frozenset[Trait]:
        """None at threshold 0, where messages are in the clear."""
        return self.traits if self.threshold else frozenset()

    @property
    def ring(self) -> Ring:
        """The ring of the masked vectors."""
        return Ring(self.ring_bits)

    def threshold_for(self, clients: int) -> int:
        """T for a cohort: the share of it, in signed mode at least floor(2n/3) + 1."""
        count = _quantization.threshold_count(self.threshold, clients)
        return max(count, 2 * clients // 3 + 1) if self.signed else count

    def levels_for(self, clients: int, *, weighted: bool = True) -> int:
        """Q for a cohort.

        Raises:
            InvalidParameter: If the sum could overflow.
        """
        weight = self.max_examples if weighted else 1
        return _quantization.choose_levels(self.ring, clients, weight, self.levels)

    # -- step 1: advertise ---------------------------------------------------------------------

    def setup(self, setup: RoundSetup) -> None:
        """Give every member a device and publish the keys.

        Raises:
            ProtocolError: If keys would come from a seed outside of a simulation, or a client
                refuses the plan.
        """
        if not self.threshold:
            return
        if self.entropy == "seed" and not setup.simulated:
            raise ProtocolError(
                "secure_aggregation(entropy='seed') is for simulations: who knows the seed opens "
                "every input, and two runs of one seed are a two-time pad. Use entropy='system'."
            )
        cohort = tuple(sorted(setup.cohort))
        self.levels_for(len(cohort))
        master = self._master(setup.generator)
        identities = {
            member: self._identity(setup.clients[member], master, member) for member in cohort
        }
        plan = Plan(
            session=_masking.derive(master, "session")[:SESSION],
            round=setup.round,
            cohort=cohort,
            threshold=self.threshold_for(len(cohort)),
            ring=self.ring,
            directory={
                member: identity.public_key().public_bytes_raw()
                for member, identity in identities.items()
                if identity is not None
            },
        )
        devices = {}
        for member in cohort:
            root = _masking.derive(master, "client", member)
            devices[member] = self.join(
                member, plan, root, identities[member], setup.clients[member]
            )
        server = setup.server
        server.clear()
        server["plan"] = plan
        server["lines"] = devices
        server["adverts"] = {member: device.advertise() for member, device in devices.items()}

    def join(
        self,
        member: int,
        plan: Plan,
        root: bytes,
        identity: Ed25519PrivateKey | None,
        memory: Memory,
    ) -> Device:
        """A client's side of the beginning: its own terms, and no session twice.

        Raises:
            ProtocolError: If it refuses the plan.
        """
        sessions: set[bytes] = memory.setdefault("sessions", set())
        if plan.session in sessions:
            raise ProtocolError(
                f"Client {member} took part in this session before; its old keys may be known."
            )
        terms = Terms(self.least_cohort, self.threshold_for)
        device = Device(member, plan, root, identity, terms)
        sessions.add(plan.session)
        memory["device"] = device
        return device

    # -- step 2: share -------------------------------------------------------------------------

    def peer(self, updates: Mapping[int, Update], setup: RoundSetup) -> Mapping[int, Update]:
        """Exchange sealed shares through the server; the updates are not touched."""
        if not self.threshold:
            return updates
        server = setup.server
        devices = {member: _device_of(setup.clients[member]) for member in server["plan"].cohort}
        letters = {member: d.share(server["adverts"]) for member, d in devices.items()}
        server["letters"] = letters
        for sender, sent in letters.items():
            for receiver, letter in sent.items():
                devices[receiver].receive(sender, letter)
        return updates

    # -- step 3: masked input ------------------------------------------------------------------

    def wire(self, message: Message, context: ClientContext) -> Message:
        """Quantise, weigh and mask."""
        if not self.threshold:
            return message
        if message.update is None:
            raise ProtocolError(
                f"secure_aggregation cannot mask what {message.encoded_by} encoded before it."
            )
        update = message.update.check()
        device = _device_of(context.memory)
        header = Header.of(update)
        words = self.encode(update, header, len(device.plan.cohort), context)
        masked = device.send(words, header)
        return Message(
            client=message.client,
            num_examples=0,
            update=None,
            payload={"masked": _quantization.word_tensor(masked, self.ring)},
            encoded_by=self.key,
        )

    def encode(
        self, update: Update, header: Header, clients: int, context: ClientContext
    ) -> _masking.Words:
        """x_u: the weighted integers of an update, and behind them its number of examples.

        Raises:
            ProtocolError: If the client has more examples than its weight may say.
        """
        if update.num_examples > self.max_examples:
            raise ProtocolError(
                f"Client {context.client} has {update.num_examples} examples, more than the "
                f"max_examples={self.max_examples} that the ring was laid out for; raise it."
            )
        levels = self.levels_for(clients, weighted=header.weighted)
        values = header.flatten(update)
        context.memory["clipped"] = float((values.abs() > self.clip_range).double().mean())
        integers = _quantization.quantise(values, self.clip_range, levels, context.generator)
        weight = update.num_examples if header.weighted else 1
        vector = torch.from_numpy(integers * weight)
        counted = torch.cat([vector, torch.tensor([update.num_examples])])
        return _quantization.into_ring(counted.numpy(), self.ring)

    # -- step 4: unmask ------------------------------------------------------------------------

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Open the sum over the survivors.

        Raises:
            ProtocolError: If fewer than t survive, or the vectors do not fit together.
        """
        if not self.threshold:
            return combine(messages)
        server = context.server
        lines: dict[int, Device] | None = server.pop("lines", None)
        if lines is None:
            raise ProtocolError(
                f"Round {context.round}: no keys were agreed, so there is no sum to open."
            )
        plan: Plan = server["plan"]
        survivors = sorted(messages)
        if len(survivors) < plan.threshold:
            raise ProtocolError(
                f"Round {context.round}: {len(survivors)} of {len(plan.cohort)} clients survived, "
                f"secure aggregation needs {plan.threshold} (threshold={self.threshold:.3g}); "
                "the round is lost. Lower the threshold or repeat the round."
            )
        header = common_header({member: lines[member] for member in survivors})
        masked = {member: messages[member].payload["masked"] for member in survivors}
        confirmations = {m: lines[m].confirm(survivors) for m in survivors}
        answers = {m: lines[m].reveal(survivors, confirmations) for m in survivors}
        seeds, mask_secrets = open_secrets(plan, answers, server["adverts"])
        server.update(masked=masked, seeds=seeds, mask_secrets=mask_secrets)
        total = sum_words([_quantization.tensor_words(y, self.ring) for y in masked.values()])
        clear = _quantization.from_ring(
            remove_masks(plan, total, server["adverts"], seeds, mask_secrets), self.ring
        )
        examples = int(clear[-1])
        levels = self.levels_for(len(plan.cohort), weighted=header.weighted)
        mean = _quantization.mean_of_sum(
            clear[:-1],
            examples if header.weighted else len(survivors),
            _quantization.step_size(self.clip_range, levels),
        )
        pooled = header.unflatten(mean, examples, len(survivors))
        # What else the server does to an aggregate, it does to the one message that it can read.
        combined = combine(
            {survivors[0]: Message(client=survivors[0], num_examples=examples, update=pooled)}
        )
        return replace(combined, num_examples=examples, clients=len(survivors))

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The client's whole mask of the last round: payload - mask = input (mod R)."""
        device = memory.get("device")
        if not isinstance(device, Device) or device.header is None:
            return {}
        size = sum(part.numel() for part in device.header.parts()) + 1
        return {"mask": _quantization.word_tensor(device.mask(size), self.ring)}

    def _master(self, generator: torch.Generator) -> bytes:
        if self.entropy == "system":
            return os.urandom(_masking.KEY)
        return bytes(torch.randint(256, (_masking.KEY,), generator=generator).tolist())

    def _identity(self, memory: Memory, master: bytes, member: int) -> Ed25519PrivateKey | None:
        """The client's signing key, made once and kept."""
        if not self.signed:
            return None
        if "identity" not in memory:
            root = _masking.derive(master, "identity", member)
            memory["identity"] = Ed25519PrivateKey.from_private_bytes(root)
        identity: Ed25519PrivateKey = memory["identity"]
        return identity


def _device_of(memory: Memory) -> Device:
    device = memory.get("device")
    if not isinstance(device, Device):
        raise ProtocolError("secure_aggregation: this client took no part in the key agreement.")
    return device
