r"""Homomorphic encryption: the server adds ciphertexts that only clients can open.

Additively homomorphic aggregation, the category that Mansouri, Önen, Ben Jaballah and Conti (PETS
2023) survey, with CKKS. All clients hold one key pair, the server the public part.

1. *Keys* (hook ``setup``): drawn once, by the first client; later ones get them from clients.
2. *Map* (``update``, ``peer``; only if part of the update is encrypted): client k finds how much
   each parameter tells of an example, and all encrypt and add these maps, so that the server
   learns nothing but which entries are to be encrypted:

   .. math:: s_m = \frac{1}{\sum_k n_k} \sum_k \sum_{i \in k}
             \Bigl| \frac{\partial \ell(x_i, y_i)}{\partial \theta_m} \Bigr|.

3. *Encrypt* (``wire``): the share ``encrypted`` of all parameters with the largest :math:`s_m`,
   times :math:`n_k`, packed N/2 to a ciphertext, and all floating-point buffers with them; last
   :math:`n_k` itself. Other entries travel in the clear.
4. *Add* (``aggregate``): the server adds ciphertexts; clients open the sum and divide.

**Who sees what.** *Wire and server*: ciphertexts, and the entries left in the clear. *Aggregate*
(what the server makes and broadcasts): a ciphertext as well, so that every attack is refused
there; with a part encrypted, the mean's clear entries. *A client* (vantage ``peer``) opens the sum:
towards it the row equals secure aggregation. *A client and the server together*, a sybil of the
server's for one: they open every single upload, since all clients hold one key (study ``frontier``:
sixteen images of sixteen, by [31]). So does whoever is granted the secrets. All of this presumes
that nobody hands the server the opened model, to test it or to keep it: then the row equals secure
aggregation too.

**Knob.** The share of parameters that is encrypted; at 0 nothing is, bit for bit as without.

What an adversary does about a part: it compares the entries that it sees.

Departures:
    * The list of works has no proposal of this row; the order of encryption follows FedML-HE (Jin
      et al., 2023; from memory), whose map is the derivative of every gradient entry by the label.
      With the label as the weight of its own class that is the formula above.
    * The server of the text gets means; here sums and :math:`\sum_k n_k`, both encrypted. With a
      part encrypted, :math:`n_k` travels in the clear, as the clear part needs it for its mean.
    * Opened sums carry CKKS' noise, which says something about the key to whoever may choose
      inputs (Li and Micciancio, EUROCRYPT 2021); nothing is added against that.
    * Keys and noise come from SEAL's own generator, so that ciphertexts differ in every run, and
      opened sums by less than :meth:`.Ring.error_bound`.
    * Integer counters of buffers stay as broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call

from leakatlas.defenses.formal.crypto._ckks import Adder, Key, Ring, packed, unpacked
from leakatlas.defenses.formal.crypto._header import Header
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
    average,
    model_state,
)
from leakatlas.params import Fraction, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class HomomorphicEncryption(Defense):
    """Encrypts updates under a key that the clients share and the server lacks.

    Args:
        encrypted: Share of the parameters that is encrypted, the most telling first.
        order: Which parameters come first where a part is encrypted: by the map, or in an order
            that is drawn and public.
        degree: Degree N of the polynomials.
        moduli: Bits of the primes of the modulus. Sums need no multiplication, so that
            ``(60, 40)`` with degree 4096 serves too, at two fifths of the traffic.
        scale_bits: Precision of the numbers.
    """

    key: ClassVar[str] = "homomorphic_encryption"
    knob: ClassVar[str] = "encrypted"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.5, 1.0)
    stage: ClassVar[int] = 90

    encrypted: Fraction = 1.0
    order: Literal["map", "drawn"] = "map"
    degree: PositiveInt = Ring.degree
    moduli: tuple[PositiveInt, ...] = Ring.moduli
    scale_bits: Positive = Ring.scale_bits

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encrypted == 1 and self.order != "map":
            raise InvalidParameter(
                f"HomomorphicEncryption(order={self.order!r}) has no effect where everything is "
                "encrypted; leave it out, or set encrypted below 1."
            )

    def active_traits(self) -> frozenset[Trait]:
        """What is hidden from the server, and whether the batch is looked at again."""
        if not self.encrypted:
            return frozenset()
        found = {Trait.HIDES_UPDATES}
        if self.encrypted < 1:
            found.add(Trait.SHOWS_PART)
        if self._mapped:
            found.add(Trait.READS_BATCH)
        return frozenset(found)

    @property
    def ring(self) -> Ring:
        """The parameters of CKKS."""
        return Ring(degree=self.degree, moduli=self.moduli, scale_bits=self.scale_bits)

    @property
    def _mapped(self) -> bool:
        return 0 < self.encrypted < 1 and self.order == "map"

    # -- 1. keys -------------------------------------------------------------------------------

    def setup(self, setup: RoundSetup) -> None:
        """See that every client holds the key pair, and the server its public part."""
        if not self.encrypted:
            return
        held = [memory["key"] for memory in setup.clients.values() if "key" in memory]
        key = held[0] if held else Key(self.ring)
        for memory in setup.clients.values():
            memory["key"] = key
        if "adder" not in setup.server:
            setup.server["adder"] = Adder(key.public())
        setup.server["line"] = Line(key, setup.clients)
        setup.server["order"] = int(torch.randint(2**62, (1,), generator=setup.generator))

    # -- 2. map --------------------------------------------------------------------------------

    def update(self, update: Update, context: ClientContext) -> Update:
        """Note how much each parameter tells of this client's examples; the update stays."""
        if self._mapped:
            context.memory["map"] = sensitivity(update, context)
        return update

    def peer(self, updates: Mapping[int, Update], setup: RoundSetup) -> Mapping[int, Update]:
        """Agree on what is encrypted; the updates are not touched."""
        if not self.encrypted:
            return updates
        size = sum(t.numel() for t in next(iter(updates.values())).tensors.values())
        drawn = torch.Generator().manual_seed(setup.server["order"])
        ranks = torch.rand(size, generator=drawn, dtype=torch.float64)
        if self._mapped:
            keys = {c: memory["key"] for c, memory in setup.clients.items() if "map" in memory}
            maps = [keys[c].encrypt(setup.clients[c].pop("map")) for c in sorted(keys)]
            ranks = setup.server["line"].open(setup.server["adder"].add(maps))
        chosen = torch.zeros(size, dtype=torch.bool)
        chosen[ranks.argsort(descending=True, stable=True)[: round(self.encrypted * size)]] = True
        setup.server["chosen"] = chosen
        for memory in setup.clients.values():
            memory["chosen"] = chosen
            memory["cohort"] = len(updates)
        return updates

    # -- 3. encrypt ----------------------------------------------------------------------------

    def wire(self, message: Message, context: ClientContext) -> Message:
        """Encrypt what was chosen; the rest stays in the clear, with zeros in its place."""
        if not self.encrypted:
            return message
        if message.update is None:
            raise ProtocolError(
                f"homomorphic_encryption cannot encrypt what {message.encoded_by} encoded before."
            )
        update, memory = message.update.check(), context.memory
        header = Header.of(update)
        values, hidden = header.flatten(update), hidden_entries(header, memory["chosen"])
        weight = update.num_examples if header.weighted else 1
        numbers = torch.cat([weight * values[hidden], torch.tensor([float(update.num_examples)])])
        if len(numbers) and float(numbers.abs().max()) * memory["cohort"] >= self.ring.largest:
            raise ProtocolError(
                f"Client {message.client}: the sum of {memory['cohort']} vectors with entries of "
                f"{float(numbers.abs().max()):.3g} may exceed {self.ring.largest:.3g}, the most "
                f"that moduli={self.moduli} and scale_bits={self.scale_bits:g} hold; clip the "
                "updates or take larger moduli."
            )
        memory["header"] = header
        return Message(
            client=message.client,
            num_examples=0 if self.encrypted == 1 else update.num_examples,
            update=self._clear(header, values, hidden, update.num_examples),
            payload=packed(memory["key"].encrypt(numbers)),
            encoded_by=self.key,
        )

    def _clear(
        self, header: Header, values: Tensor, hidden: Tensor, examples: int
    ) -> Update | None:
        """The part of an update that everybody sees."""
        if self.encrypted == 1:
            return None
        shown = header.unflatten(values.masked_fill(hidden, 0.0), examples, 1)
        return replace(shown, buffers_after={})

    # -- 4. add --------------------------------------------------------------------------------

    def aggregate(
        self,
        messages: Mapping[int, Message],
        combine: Callable[[Mapping[int, Message]], Update],
        context: ServerContext,
    ) -> Update:
        """Add ciphertexts, let a client open the sum, and put the clear mean beside it."""
        if not self.encrypted:
            return combine(messages)
        server, first = context.server, min(messages)
        line: Line | None = server.pop("line", None)
        if line is None:
            raise ProtocolError(f"Round {context.round}: no keys were agreed; nobody opens a sum.")
        total = server["adder"].add([unpacked(dict(m.payload)) for m in messages.values()])
        server["sum"] = total
        opened = line.open(total)
        examples = round(float(opened[-1]))
        header = line.header()
        weight = examples if header.weighted else len(messages)
        mean = torch.zeros(header.size, dtype=torch.float64)
        hidden = hidden_entries(header, server["chosen"])
        mean[hidden] = opened[:-1] / weight
        clear = {c: m.update for c, m in messages.items() if m.update is not None}
        if clear:
            mean += in_the_clear(header, average(clear), hidden)
        pooled = header.unflatten(mean, examples, len(messages))
        # What else is done to an aggregate is done to the one message that can be read.
        combined = combine({first: Message(client=first, num_examples=examples, update=pooled)})
        return replace(combined, num_examples=examples, clients=len(messages))

    def broadcast(self, aggregate: Update, context: ServerContext) -> Update | None:
        """The entries of the mean that never were encrypted."""
        if not self.encrypted:
            return aggregate
        header = Header.of(aggregate)
        hidden = hidden_entries(header, context.server["chosen"])
        return self._clear(header, header.flatten(aggregate), hidden, aggregate.num_examples)

    # -- those who hold the key, and those who do not ------------------------------------------

    def members_read(self, message: Message, memory: Memory) -> Update | None:
        """The whole upload, to whoever holds the key that all clients share."""
        header: Header = memory["header"]
        numbers = memory["key"].open(unpacked(dict(message.payload)))
        examples = round(float(numbers[-1]))
        hidden = hidden_entries(header, memory["chosen"])
        values = torch.zeros(header.size, dtype=torch.float64)
        values[hidden] = numbers[:-1] / (examples if header.weighted else 1)
        if message.update is not None:
            values += in_the_clear(header, message.update, hidden)
        return header.unflatten(values, examples, 1)

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The key pair, as bytes."""
        if "key" not in memory:
            return {}
        return {"key": torch.frombuffer(bytearray(memory["key"].secret()), dtype=torch.uint8)}

    def simulate(
        self, update: dict[str, Tensor], x: Tensor, y: Tensor, observed: Update
    ) -> dict[str, Tensor]:
        """The candidate's entries where the upload shows any; all, if all are encrypted."""
        del x, y
        if self.encrypted in (0, 1):  # either nothing is missing, or somebody opened it
            return update
        return {name: v * (observed.tensors[name] != 0).to(v.dtype) for name, v in update.items()}


class Line:
    """The server's line to the clients, from the keys to the end of the round.

    Args:
        key: Theirs.
        memories: Of each.
    """

    def __init__(self, key: Key, memories: Mapping[int, Memory]) -> None:
        self._key, self._memories = key, memories

    def open(self, ciphertexts: Sequence[bytes]) -> Tensor:
        """What a client makes of a sum that it is sent, ``(D,)``."""
        return self._key.open(ciphertexts)

    def header(self) -> Header:
        """Names and shapes behind the uploads, which are no secret."""
        found: Header = next(m["header"] for m in self._memories.values() if "header" in m)
        return found


def hidden_entries(header: Header, chosen: Tensor) -> Tensor:
    """Which entries of a vector are encrypted: the chosen ones, and every buffer; boolean."""
    rest = torch.ones(header.size - len(chosen), dtype=torch.bool)
    return torch.cat([chosen, rest])


def in_the_clear(header: Header, update: Update, hidden: Tensor) -> Tensor:
    """The entries ``(D,)`` of an update that was sent without its hidden ones; zeros in place."""
    values = header.flatten(replace(update, buffers_after=update.buffers_before))
    return values.masked_fill(hidden, 0.0)


def sensitivity(update: Update, context: ClientContext) -> Tensor:
    """The sum over examples of every gradient entry's magnitude, ``(D,)`` float64.

    Args:
        update: Whose tensors are meant, in their order.
        context: Model and batch.
    """
    model, buffers = context.model, dict(context.model.named_buffers())
    held = model_state(model)
    total = {name: torch.zeros_like(t) for name, t in update.tensors.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            int(torch.randint(2**62, (1,), generator=context.generator))
        )
        for x, y in zip(context.x.split(1), context.y.split(1), strict=True):
            leaves = {name: held[name].detach().requires_grad_() for name in total}
            state = {**held, **{n: b.clone() for n, b in buffers.items()}, **leaves}
            with torch.enable_grad():
                loss = context.protocol.loss(functional_call(model, state, (x,)), y)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, g in zip(total, found, strict=True):
                if g is not None:
                    total[name] += g.abs()
    return torch.cat([t.detach().cpu().double().flatten() for t in total.values()])
