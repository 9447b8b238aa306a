"""Speed and memory of a read-out, and a round that never holds a hundred models at once.

Clients train one after the other; each update is added to the sum and forgotten. What the server
itself sent is left out of the view, as reading a gradient or a change of weights does not need it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leakatlas.attacks.analytic.isolation.loki import LOKI
from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.bench import examine as look
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import readout
from leakatlas.blocks.watch import Watch
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation, _quantization
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring
from leakatlas.defenses.formal.crypto.secure_aggregation._quantization import Header
from leakatlas.fl import ClientContext, FedSGD, RoundRecord, Stage, Update, View, stream
from leakatlas.fl.hooks import Message
from leakatlas.fl.training import train_locally

MIB = 2**20
ReadOut = RobbingTheFed | LOKI


def measure(cell: Cell) -> dict[str, Any]:
    """One round, its read-out scored, timed and weighed."""
    attack: ReadOut
    if cell.label.startswith("loki"):
        attack = replace(LOKI.tuned(), bins=32)
    else:
        attack = RobbingTheFed(
            bins=1_024, quantiles="normal" if "normal" in cell.label else "empirical"
        )
    stage = scene.staged(cell)
    total = Summed(cell.case.clients) if "secure" in cell.label else Plain()
    view, seconds = lean_round(stage, attack, total)
    found = attack(view)
    trial = harness.Trial(
        view, harness.truth_of(stage, 0), (), found, stage.box.denormalize(found.images)
    )
    scores = harness.scored(trial, stage, public=scene.public_images(stage))
    exact, batch = look.exact(trial), cell.case.batch
    h, edges = _measurements(trial, attack)
    single = torch.cat([look.alone(part, edges) for part in h.split(batch)])
    return {
        "exact": look.share(exact),
        "alone": look.share(single),
        "exact_of_alone": look.share(exact[single]),
        "expected_alone": readout.expected_singletons(batch, len(edges) - 1) / batch,
        "psnr": [image.psnr for image in scores.images],
        "seconds_of_round": seconds,
        "clipped": total.clipped,
        **costs(view, attack),
    }


def _measurements(trial: harness.Trial, attack: ReadOut) -> tuple[Tensor, Tensor]:
    images, key = trial.truth.images.flatten(1), trial.view.key
    if isinstance(attack, LOKI):
        return images.double().mean(dim=1), key["edges"].double()
    return images @ key["w"], key["edges"]


# -- one lean round ------------------------------------------------------------------------------


class Plain:
    """A running mean of updates, weighted by their examples."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.examples = 0
        self.clipped: list[float] = []

    def add(self, update: Update, context: ClientContext) -> None:
        """Take one client's update into the sum."""
        del context
        self.examples += update.num_examples
        for name, tensor in update.tensors.items():
            held = self.sums.setdefault(name, torch.zeros_like(tensor))
            held.add_(tensor, alpha=update.num_examples)

    def mean(self, template: Update, clients: int) -> Update:
        """What the server sees."""
        for total in self.sums.values():
            total /= self.examples
        return replace(template, tensors=self.sums, num_examples=self.examples, clients=clients)


class Summed(Plain):
    """The ring sum of secure aggregation: quantised, weighted and added modulo 2^64.

    Masks cancel in the ring without a remainder, so this is, bit for bit, what the protocol opens;
    expanding one for every pair of a hundred clients would cost a thousand times the model.
    """

    def __init__(self, clients: int) -> None:
        super().__init__()
        self.clients = clients
        self.defense = SecureAggregation(ring_bits=64)
        self.total: Any = None
        self.header: Header | None = None

    def add(self, update: Update, context: ClientContext) -> None:
        """Encode as the defense does, and add."""
        self.header = self.header or Header.of(update)
        words = self.defense.encode(update, self.header, self.clients, context)
        self.clipped.append(context.memory["clipped"])
        self.total = words if self.total is None else self.total + words

    def mean(self, template: Update, clients: int) -> Update:
        """Decode the sum as the server does."""
        assert self.header is not None
        clear = _quantization.from_ring(self.total, Ring(64))
        levels = self.defense.levels_for(self.clients)
        step = _quantization.step_size(self.defense.clip_range, levels)
        values = _quantization.mean_of_sum(clear[:-1], int(clear[-1]), step)
        return self.header.unflatten(values, int(clear[-1]), clients)


def lean_round(stage: Stage, attack: ReadOut, total: Plain) -> tuple[View, float]:
    """Tamper, train one client after the other, keep the sum; the view and the round's seconds."""
    view = stage.view()
    attack.check(view)
    generator = stream(attack.key, "tamper", 0)
    tampering = attack.tamper(view, generator=generator, watch=Watch())
    assert tampering is not None
    federation, protocol = stage.federation, stage.scenario.protocol
    template: Update | None = None
    begun = time.perf_counter()
    for member, client in federation.clients.items():
        sent = tampering.sent
        tampered = sent[member] if isinstance(sent, Mapping) else sent
        model = tampered.build(federation.model, pixels=client.x[0].numel())
        own = stream("training", member)
        trained = train_locally(model, client.x, client.y, protocol, generator=own)
        kind = "gradient" if isinstance(protocol, FedSGD) else "delta"
        update = Update(
            tensors=trained.tensors, kind=kind, state_hash="", num_examples=len(client.x)
        )
        draws = stream("client", member)
        total.add(update, ClientContext(member, 0, model, client.x, client.y, protocol, draws, {}))
        template = replace(update, tensors={})
    assert template is not None
    members = tuple(federation.clients)
    aggregate = total.mean(template, len(members))
    seen = Message(client=0, num_examples=aggregate.num_examples, update=aggregate)
    record = RoundRecord(
        index=0, cohort=members, sybils=frozenset(), received={0: federation.model},
        states={0: {}}, updates={}, messages={0: seen}, aggregate=aggregate, order={},
        draws={}, dropped=frozenset(),
    )  # fmt: skip
    return stage.view([record], keys=[tampering.key]), time.perf_counter() - begun


# -- cost ----------------------------------------------------------------------------------------


def costs(view: View, attack: ReadOut) -> dict[str, float]:
    """Of the whole read-out, and of the block in it that reads the weights."""
    g_w, g_b = (view.update.tensors[f"block.first.{part}"] for part in ("weight", "bias"))
    edges = view.rounds[-1].key["edges"]

    def block() -> Tensor:
        if isinstance(attack, LOKI):
            blocks = attack.blocks(view, -1, view.input_shape)
            read = [attack.read_block(b, edges, view.input_shape)[0] for b in blocks]
            return torch.cat([images.flatten(1) for images in read])
        return readout.cumulative_readout(g_w, g_b, edges[:-1]).x

    images, x = len(attack(view).images), block()
    # Least traffic: what every candidate is made of is read once, and the candidate written.
    rows = len(x) if isinstance(attack, LOKI) else 2 * len(x)
    moved = (rows * x.shape[1] + x.numel()) * x.element_size() / _least(block) / 1e9
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _least(lambda: target.copy_(source)) / 1e9
    block_sum, block_most = _allocated(block)
    whole_sum, whole_most = _allocated(lambda: attack(view))
    return {
        "images_per_second": images / _least(lambda: attack(view)),
        "moved": moved,
        "copied": copied,
        "copied_fresh": 2 * source.nbytes / _least(source.clone) / 1e9,
        "moved_over_copied": moved / copied,
        "weight": g_w.nbytes / MIB,
        "block_allocates": block_sum / g_w.nbytes,
        "block_at_once": block_most / g_w.nbytes,
        "whole_allocates": whole_sum / g_w.nbytes,
        "whole_at_once": whole_most / g_w.nbytes,
    }


def _least(call: Callable[[], object], times: int = 3) -> float:
    """Least wall time of a few calls, in seconds."""
    spent = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begun)
    return min(spent)


def _allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch allocates during a call: all added up, and the most that lay there at once.

    What the call returns counts; what was there before does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = watched.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total, alive, most = 0, 0, 0
    for _, size in steps:
        total, alive = total + max(0, size), alive + size
        most = max(most, alive)
    return total, most
