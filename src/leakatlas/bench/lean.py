"""A round of many clients that never holds two of their models at once.

Clients train one after the other; each update goes into the sum and is forgotten, so that a
hundred clients with a layer of half a gigabyte each fit a small machine. Only what is seen of the
sum is kept: the record has no updates, messages or states of single clients, and what the server
itself sent is left out of the view, as reading a gradient or a change of weights does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.fl import (
    ClientContext,
    Federation,
    FedSGD,
    RoundRecord,
    TamperedModel,
    Update,
    stream,
)
from leakatlas.fl.hooks import Message
from leakatlas.fl.training import train_locally

if TYPE_CHECKING:  # it needs a package of its own, which rounds without it do not
    from leakatlas.defenses.formal.crypto._header import Header
    from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation


class _Sum(Protocol):
    """Takes one update after the other, and opens what the server sees."""

    def add(self, update: Update, context: ClientContext) -> None: ...

    def open(self, like: Update, clients: int) -> Update: ...


def play_round(
    federation: Federation, sent: TamperedModel | Mapping[int, TamperedModel] | None
) -> RoundRecord:
    """One round of all clients, seen as an aggregate.

    Args:
        federation: Its clients, protocol and defenses; of these only secure aggregation is played.
        sent: What a malicious server sends, to all or to each; the global model if None.

    Raises:
        InvalidInput: If other defenses are in force.
    """
    total = _sum_of(federation)
    protocol, members = federation.protocol, tuple(sorted(federation.clients))
    like: Update | None = None
    for member in members:
        client = federation.clients[member]
        tampered = sent[member] if isinstance(sent, Mapping) else sent
        model = federation.model
        if tampered is not None:
            model = tampered.build(federation.model, pixels=client.x[0].numel())
        own = stream("training", member)
        trained = train_locally(model, client.x, client.y, protocol, generator=own)
        update = Update(
            tensors=trained.tensors,
            kind="gradient" if isinstance(protocol, FedSGD) else "delta",
            state_hash="",
            num_examples=len(client.x),
        )
        draws = stream("client", member)
        total.add(update, ClientContext(member, 0, model, client.x, client.y, protocol, draws, {}))
        like = replace(update, tensors={})
    assert like is not None
    aggregate = total.open(like, len(members))
    seen = Message(client=0, num_examples=aggregate.num_examples, update=aggregate)
    return RoundRecord(
        index=0, cohort=members, sybils=frozenset(), received={0: federation.model},
        states={0: {}}, updates={}, messages={0: seen}, aggregate=aggregate, order={},
        draws={}, augmentation={}, dropped=frozenset(), broadcast=aggregate,
    )  # fmt: skip


def _sum_of(federation: Federation) -> _Sum:
    if not federation.defenses:
        return _Mean()
    if [defense.key for defense in federation.defenses] == ["secure_aggregation"]:
        (defense,) = federation.defenses
        return _Ring(cast("SecureAggregation", defense), len(federation.clients))
    raise InvalidInput(
        "A lean round plays secure aggregation and no other defense; got "
        f"{', '.join(defense.key for defense in federation.defenses)}."
    )


class _Mean:
    """A running mean, weighted by examples."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._examples = 0

    def add(self, update: Update, context: ClientContext) -> None:
        self._examples += update.num_examples
        for name, tensor in update.tensors.items():
            held = self._sums.setdefault(name, torch.zeros_like(tensor))
            held.add_(tensor, alpha=update.num_examples)

    def open(self, like: Update, clients: int) -> Update:
        for total in self._sums.values():
            total /= self._examples
        return replace(like, tensors=self._sums, num_examples=self._examples, clients=clients)


class _Ring:
    """The ring sum of secure aggregation: quantised, weighted and added.

    Masks cancel in the ring without a remainder, so this is, bit for bit, what the protocol opens;
    expanding one for every pair of a hundred clients would cost a thousand times the model.
    """

    def __init__(self, defense: SecureAggregation, clients: int) -> None:
        self._defense, self._clients = defense, clients
        self._total: Any = None
        self._header: Header | None = None

    def add(self, update: Update, context: ClientContext) -> None:
        from leakatlas.defenses.formal.crypto._header import Header

        self._header = self._header or Header.of(update)
        words = self._defense.encode(update, self._header, self._clients, context)
        self._total = words if self._total is None else self._total + words

    def open(self, like: Update, clients: int) -> Update:
        from leakatlas.defenses.formal.crypto.secure_aggregation import _quantization

        assert self._header is not None
        defense, weighted = self._defense, self._header.weighted
        clear = _quantization.from_ring(self._total, defense.ring)
        levels = defense.levels_for(self._clients, weighted=weighted)
        step = _quantization.step_size(defense.clip_range, levels)
        examples = int(clear[-1])
        count = examples if weighted else clients
        values = _quantization.mean_of_sum(clear[:-1], count, step)
        return self._header.unflatten(values, examples, clients)
