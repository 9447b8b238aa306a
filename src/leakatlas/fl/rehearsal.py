"""The adversary plays its own game: a view whose update is that of images it chose itself.

Before it spends its budget on the victim, an adversary may try its attack on public images. It
holds the received state; where its letter grants them it knows the protocol and the defenses, too.
So it can do what the client did, on images whose reconstruction it can judge. Nothing of the
victim's round enters: labels, batch statistics, orders and dropout masks that were granted are
those of the adversary's own images in the new view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.errors import InvalidInput
from leakatlas.fl import state
from leakatlas.fl.draws import Draws
from leakatlas.fl.hooks import ClientContext, Defense
from leakatlas.fl.losses import Loss
from leakatlas.fl.protocol import FedSGD, Mode, Protocol
from leakatlas.fl.seeding import stream
from leakatlas.fl.statistics import batchnorm_statistics
from leakatlas.fl.training import LocalResult, train_locally
from leakatlas.fl.update import Update, average

OWN = frozenset({"labels", "batch_bn", "batch_order", "dropout_masks", "augmentation"})
"""Fields that describe the private batch; in a rehearsal they describe the adversary's images."""

GONE = frozenset({"secrets", "key"})
"""Fields that belong to the victim's round alone; a rehearsal has none."""


@dataclass(frozen=True)
class Played:
    """What the adversary's own clients sent.

    Args:
        update: Their (mean) update.
        order: Example indices of every local step of the first of them.
        drawn: What the model drew in each of these steps.
        augmentation: The seeds of their transforms.
    """

    update: Update
    order: tuple[Tensor, ...]
    drawn: tuple[Draws, ...]
    augmentation: tuple[int, ...]


def play(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    observed: Update,
    protocol: Protocol | None,
    loss: Loss,
    defenses: Sequence[Defense],
    clients: int,
    seed: int,
    box: Box | None = None,
) -> Played:
    """The clients' round on the adversary's own images.

    Defenses act as on a client, with the adversary's own randomness, but for what needs the other
    parties: masks, encryption and the server's noise are left out.

    Args:
        model: Holding the received state, in the clients' mode.
        x: All examples, model space ``(N, C, H, W)``.
        y: Labels ``(N,)``.
        observed: The victim's message, of which only kind, sign, scale, reduction and names of
            tensors are taken.
        protocol: As the adversary knows it; one gradient as the message says if None.
        loss: Of that one gradient; it goes with the architecture.
        defenses: As the adversary knows them.
        clients: How many clients hold the examples, in equal parts.
        seed: Of orders, transforms and the defenses' noise.
        box: Pixel space, as far as the adversary knows it.
    """
    if protocol is None:
        mode: Mode = "train" if model.training else "eval"
        protocol = FedSGD(reduction=observed.reduction, mode=mode, loss=loss)
    updates: dict[int, Update] = {}
    results: list[LocalResult] = []
    size = len(x) // clients
    for client in range(clients):
        part = slice(client * size, (client + 1) * size)
        working = state.load_into(model, state.model_state(model))
        contexts = [
            ClientContext(client, 0, model, x[part], y[part], protocol,
                          stream(seed, "rehearsed client", client, defense.key), {})
            for defense in defenses
        ]  # fmt: skip
        result = train_locally(
            working, x[part], y[part], protocol, defenses=defenses, contexts=contexts,
            generator=stream(seed, "rehearsed training", client), box=box,
        )  # fmt: skip
        update = replace(
            observed,
            tensors={n: result.tensors[n] for n in observed.tensors},
            kind="gradient" if isinstance(protocol, FedSGD) else "delta",
            num_examples=size,
            sign=1,
            scale=1.0,
            buffers_after=result.buffers_after if observed.buffers_after else {},
            clients=1,
        )
        for defense, context in zip(defenses, contexts, strict=True):
            update = defense.update(update, context)
        updates[client] = update
        results.append(result)
    sent = average(updates) if clients > 1 else updates[0]
    factor = observed.sign * observed.scale
    tensors = sent.tensors
    if observed.kind == "weights":
        held = {n: p.detach() for n, p in model.named_parameters()}
        tensors = {n: held[n] + t for n, t in tensors.items()}
    sent = replace(
        sent,
        tensors={n: t * factor for n, t in tensors.items()},
        kind=observed.kind,
        num_examples=len(x),
        sign=observed.sign,
        scale=observed.scale,
        clients=observed.clients,
    )
    return Played(sent, results[0].order, results[0].draws, results[0].augmentation)


def own_fields(
    fields: Mapping[str, Any],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    played: Played,
) -> dict[str, Any]:
    """The fields of the rehearsal's view: those of the victim's batch replaced or taken away.

    Raises:
        InvalidInput: If the batch has another shape than the victim's.
    """
    shape = (fields["num_examples"], *fields["input_shape"])
    if tuple(x.shape) != shape or tuple(y.shape) != shape[:1]:
        raise InvalidInput(
            f"A rehearsal takes images {shape} and labels {shape[:1]}, as the victim's batch has; "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    own = {n: v for n, v in fields.items() if n not in OWN | GONE}
    last = fields["rounds"][-1]
    own["rounds"] = (replace(last, update=played.update, payload={}, key={}),)
    if "others" in fields:
        own["others"] = fields["others"][-1:]
    if "labels" in fields:
        own["labels"] = y.clone()
    if "batch_order" in fields:
        own["batch_order"] = tuple(indices.clone() for indices in played.order)
    if "batch_bn" in fields:
        with torch.no_grad():
            own["batch_bn"] = batchnorm_statistics(model, state.model_state(model), x)
    if "dropout_masks" in fields:
        own["dropout_masks"] = played.drawn
    if "augmentation" in fields:
        own["augmentation"] = played.augmentation
    return own
