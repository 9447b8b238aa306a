"""Measures the analytic read-outs at the size they are known for; writes ``results/scale.json``.

    python benchmarks/scale.py [CASE ...] --data FOLDER

FOLDER holds ``cifar10/{train,test}.parquet`` and ``imagenet-samples/test.parquet``. Every case runs
in a process of its own, so that its peak memory is its own. Cases that are not asked for keep the
figures that the file already holds.

Each case says how many images were recovered exactly, beside what theory expects of independent
measurements: ``n (1 - 1/k)^(n-1)`` of n images alone in one of k bins. It says how fast the
read-out is, in images and in bytes, beside the bandwidth of a plain copy in the same process, and
how much memory the read-out took beyond what lay there before, beside the size of what it read.

Rounds are played here one client at a time, each update added to the sum and forgotten: a hundred
models of 150 MB never coexist. What the server itself sent is left out of the view, as a read-out
of a gradient or of a change of weights does not need it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from analytic import alone, decibels
from analytic_active import Victim
from scipy.stats import binom
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from leakatlas.attacks.analytic.closed_form.spear import SPEAR, expected_samples
from leakatlas.attacks.analytic.isolation.loki import LOKI
from leakatlas.attacks.analytic.isolation.scale_mia import ScaleMIA, decode, encode, find_parts
from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.attacks.api import ActiveAttack, Reconstruction
from leakatlas.bench.harness import run_trial
from leakatlas.blocks import readout
from leakatlas.blocks.watch import Watch
from leakatlas.data import CIFAR10, Box, ImageSet, parquet
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation, _quantization
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring, expand
from leakatlas.defenses.formal.crypto.secure_aggregation._quantization import Header
from leakatlas.fl import (
    ClientContext,
    FedAVG,
    FedSGD,
    ModelRef,
    Protocol,
    RoundRecord,
    Scenario,
    Stage,
    TamperedModel,
    Update,
    View,
    stage,
    stream,
)
from leakatlas.fl.hooks import Message
from leakatlas.fl.training import train_locally
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.intervals import binomial, bootstrap
from leakatlas.threat import Vantage

MIB = 2**20

KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Makes glibc reuse freed memory instead of asking the system for fresh pages at every large
tensor: mapping those costs several times what writing them does."""

EXACT = 1e-3
"""Root mean square error, in pixels of [0, 1], below which an image of a float32 update counts as
exact: a quarter of a grey level, so that rounding to 8 bits gives the original."""

EXACT_DOUBLE = 1e-6
"""The same for updates in float64."""

Measures = list[dict[str, Any]]


# -- measures --------------------------------------------------------------------------------------


def figure(name: str, value: float, unit: str, note: str) -> dict[str, Any]:
    """One value of one run."""
    return {"name": name, "value": value, "unit": unit, "interval": None, "n": 1, "note": note}


def share(name: str, hits: int, trials: int, note: str) -> dict[str, Any]:
    """A share with its Wilson interval."""
    low, high = binomial(hits, trials)
    return {
        "name": name, "value": hits / trials, "unit": "share", "interval": [low, high],
        "n": trials, "note": note,
    }  # fmt: skip


def mean(name: str, values: Iterable[float], unit: str, note: str) -> dict[str, Any]:
    """A mean with its bootstrap interval."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    low, high = bootstrap(sample, generator=stream("scale", name))
    return {
        "name": name, "value": float(sample.mean()), "unit": unit, "interval": [low, high],
        "n": len(sample), "note": note,
    }  # fmt: skip


def occupancy(case: str, batch: int, bins: int, batches: int = 1) -> dict[str, Any]:
    """The expected share of images alone in their bin, with the binomial 95 % range of one run."""
    images = batch * batches
    p = readout.expected_singletons(batch, bins) / batch
    low, high = binom.interval(0.95, images, p)
    return {
        "name": f"{case}: expected share alone, iid", "value": p, "unit": "share",
        "interval": [float(low) / images, float(high) / images], "n": images,
        "note": f"n (1 - 1/k)^(n-1) with n={batch}, k={bins}; range of a binomial count, which "
        "takes the images as independent",
    }  # fmt: skip


def copy_bandwidth() -> tuple[float, float]:
    """Bytes per second, read and written, of a copy of 256 MiB: the best of five.

    First into memory that was written before, then into memory fresh from the system, whose pages
    must be zeroed and mapped; candidates go there too.
    """
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    warm = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    fresh = min(seconds(source.clone) for _ in range(5))
    return 2 * source.nbytes / warm, 2 * source.nbytes / fresh


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch allocates during a call: all added up, and the most that lay there at once.

    What the call returns counts; what was there before does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    steps = sorted(
        (event.start_ns(), event.nbytes())
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    total, alive, most = 0, 0, 0
    for _, size in steps:
        total += max(0, size)
        alive += size
        most = max(most, alive)
    return total, most


def cost(
    case: str, view: View, attack: ActiveAttack, read: Callable[[], Tensor], weight: Tensor
) -> Measures:
    """Speed and memory of the whole attack on the view, and of the read-out block in it.

    Args:
        case: Its name.
        view: What the adversary holds.
        attack: Its read-out.
        read: The block alone; gives ``(M, n)`` candidates.
        weight: What it reads from, for its size.
    """
    whole = min(seconds(lambda: attack(view)) for _ in range(3))
    whole_sum, whole_most = allocated(lambda: attack(view))
    block = min(seconds(read) for _ in range(3))
    block_sum, block_most = allocated(read)
    found = attack(view)
    x = read()
    images = len(found.images)
    # Least traffic: what every candidate is made of is read once, and the candidate written.
    rows = (len(x) if isinstance(attack, LOKI) else 2 * len(x)) * x.shape[1]
    moved = (rows + x.numel()) * x.element_size()
    plain, fresh = copy_bandwidth()
    size = f"W of {weight.nbytes / MIB:.0f} MiB, {len(x)} candidates of {x.nbytes / MIB:.1f} MiB"
    return [
        figure(f"{case}: images per second, whole read-out", images / whole, "1/s",
               f"{images} candidates in {whole:.3g} s, ranking and clipping included; best of 3"),
        figure(f"{case}: bytes moved per second, block", moved / block / 1e9, "GB/s",
               f"{moved / MIB:.1f} MiB at least, in {block:.3g} s; best of 3"),
        figure(f"{case}: bandwidth of a copy", plain / 1e9, "GB/s", "256 MiB, read and written"),
        figure(f"{case}: bandwidth of a copy into fresh memory", fresh / 1e9, "GB/s",
               "the same into pages that the system must map first, as candidates are"),
        figure(f"{case}: bytes moved per second over a copy's", moved / block / plain, "x", size),
        figure(f"{case}: bytes moved per second over a fresh copy's", moved / block / fresh, "x",
               size),
        figure(f"{case}: size of W", weight.nbytes / MIB, "MiB", str(tuple(weight.shape))),
        figure(f"{case}: bytes the block allocates over the size of W", block_sum / weight.nbytes,
               "x", f"all allocations added up; {size}"),
        figure(f"{case}: most memory of the block at once over the size of W",
               block_most / weight.nbytes, "x", f"its candidates included; {size}"),
        figure(f"{case}: bytes the whole read-out allocates over the size of W",
               whole_sum / weight.nbytes, "x",
               f"all allocations added up, candidates ranked and clipped included; {size}"),
        figure(f"{case}: most memory of the whole read-out at once over the size of W",
               whole_most / weight.nbytes, "x", f"its candidates included; {size}"),
    ]  # fmt: skip


def scores(images: Tensor, truth: Tensor) -> Tensor:
    """Root mean square error of every original, infinite for one without a candidate.

    Distances come from float64 products, whose cancellation (1e-8) is far below :data:`EXACT`; an
    exact distance is then taken of the assigned pairs.
    """
    error = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    if len(images) == 0:
        return error
    found, wanted = images.clamp(0, 1).flatten(1), truth.flatten(1)
    squares = found.double().square().sum(1)[:, None] + wanted.double().square().sum(1)
    cost = (squares - 2 * (found.double() @ wanted.double().T)).clamp(min=0)
    for original, candidate in enumerate(assign(cost).of_original):
        if candidate is not None:
            gap = found[candidate].double() - wanted[original].double()
            error[original] = gap.square().mean().sqrt()
    return error


def quality(case: str, error: Tensor, note: str) -> Measures:
    """Exact images and PSNR, a missing image counting as a failure and as 0 dB."""
    psnr = decibels(error)
    return [
        share(f"{case}: recovered exactly", int((error < EXACT).sum()), len(error), note),
        mean(f"{case}: mean psnr of all", psnr.tolist(), "dB", "a missing image counts as 0 dB"),
        share(f"{case}: psnr over 30 dB", int((psnr > 30).sum()), len(error), note),
    ]


# -- one lean round --------------------------------------------------------------------------------


class Plain:
    """A running mean of updates, weighted by their examples."""

    def __init__(self, clients: int) -> None:
        del clients
        self.sums: dict[str, Tensor] = {}
        self.examples = 0

    def add(self, update: Update, context: ClientContext) -> None:
        """Take one client's update into the sum."""
        del context
        self.examples += update.num_examples
        for name, tensor in update.tensors.items():
            held = self.sums.get(name)
            if held is None:
                self.sums[name] = tensor * update.num_examples
            else:
                held.add_(tensor, alpha=update.num_examples)

    def mean(self, template: Update, clients: int) -> Update:
        """What the server sees."""
        for total in self.sums.values():
            total /= self.examples
        return replace(template, tensors=self.sums, num_examples=self.examples, clients=clients)


class Summed(Plain):
    """The ring sum of secure aggregation: quantised, weighted and added modulo 2^64.

    The masks are left out. They cancel in the ring without a remainder, so this is, bit for bit,
    what the protocol opens (case ``masked`` compares them), but expanding a mask for
    every pair of clients costs clients^2 / 2 keystreams of the model's size.
    """

    def __init__(self, clients: int) -> None:
        super().__init__(clients)
        self.clients = clients
        self.defense = SecureAggregation(ring_bits=64)
        self.total: Any = None
        self.header: Header | None = None
        self.clipped: list[float] = []

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
        step = _quantization.step_size(
            self.defense.clip_range, self.defense.levels_for(self.clients)
        )
        values = _quantization.mean_of_sum(clear[:-1], int(clear[-1]), step)
        return self.header.unflatten(values, int(clear[-1]), clients)


def lean_round(set_up: Stage, attack: ActiveAttack, total: Plain) -> tuple[View, float]:
    """Tamper, train one client after the other, keep the sum; the view and the round's seconds."""
    generator = stream(attack.key, "tamper", 0)
    view = set_up.view()
    attack.check(view)
    tampering = attack.tamper(view, generator=generator, watch=Watch())
    assert tampering is not None
    federation, protocol = set_up.federation, set_up.scenario.protocol
    begun = time.perf_counter()
    template: Update | None = None
    for member, client in federation.clients.items():
        sent = tampering.sent
        tampered = sent[member] if isinstance(sent, Mapping) else sent
        model = tampered.build(federation.model, pixels=client.x[0].numel())
        trained = train_locally(
            model, client.x, client.y, protocol, generator=stream("training", member)
        )
        update = Update(
            tensors=trained.tensors,
            kind="gradient" if isinstance(protocol, FedSGD) else "delta",
            state_hash="",
            num_examples=len(client.x),
        )
        context = ClientContext(
            member, 0, model, client.x, client.y, protocol, stream("client", member), {}
        )
        total.add(update, context)
        template = replace(update, tensors={})
    assert template is not None
    members = tuple(federation.clients)
    aggregate = total.mean(template, len(members))
    seen = Message(client=0, num_examples=aggregate.num_examples, update=aggregate)
    record = RoundRecord(
        index=0, cohort=members, sybils=frozenset(), received={0: federation.model},
        states={0: {}}, updates={}, messages={0: seen}, aggregate=aggregate, order={},
        dropped=frozenset(),
    )  # fmt: skip
    return set_up.view([record], keys=[tampering.key]), time.perf_counter() - begun


def staged(
    model: nn.Module, victims: ImageSet, public: ImageSet, *, clients: int = 1,
    protocol: Protocol | None = None,
) -> Stage:  # fmt: skip
    """A stage of letter G on plain pixels; several clients are seen as a sum."""
    scenario = Scenario(
        model=ModelRef("object", type(model).__name__), letter="G", clients=clients,
        protocol=protocol or FedSGD(),
        vantage=Vantage.AGGREGATE if clients > 1 else Vantage.SERVER,
    )  # fmt: skip
    return stage(scenario, model=model, victims=victims, surrogate=public, box=Box.unit(3))


def convnet(size: int, classes: int = 10) -> nn.Module:
    """The small benign model behind the inserted layers."""
    reference = ModelRef("builtin", "convnet", {"size": size, "width": 8, "classes": classes})
    return reference.build()


# -- the cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Where the data lie."""

    root: Path

    def cifar(self, part: str, limit: int) -> ImageSet:
        """The first images of CIFAR-10's ``train`` or ``test``."""
        return parquet(self.root / "cifar10" / f"{part}.parquet", limit=limit)

    def photos(self, size: int) -> ImageSet:
        """The ImageNet sample photos, one of a class."""
        return parquet(self.root / "imagenet-samples" / "test.parquet", size)


def robbing_the_fed(folder: Folder, quantiles: readout.Quantiles) -> Measures:
    """[28]: 1,024 bins at 3x224x224, a batch of 256 photos."""
    photos = folder.photos(224)
    victims, public = photos.subset(range(256)), photos.subset(range(256, len(photos)))
    case = f"robbing_the_fed 3x224x224, batch 256, 1,024 bins, {quantiles} quantiles"
    attack = RobbingTheFed(bins=1_024, quantiles=quantiles)
    classes = len(photos.classes)
    set_up = staged(convnet(224, classes), victims, public)
    view, trained = lean_round(set_up, attack, Plain(1))
    found = attack(view)
    error = scores(found.images, victims.images)
    key = view.key
    single = alone(victims.images.flatten(1) @ key["w"], key["edges"])
    note = f"ConvNet behind, FedSGD, float32; thresholds from {len(public)} other photos"
    measures = quality(case, error, note)
    measures.append(occupancy(case, 256, 1_024))
    measures.append(share(f"{case}: alone in a bin", int(single.sum()), 256, "from the true h"))
    measures.append(
        share(f"{case}: of those recovered exactly", int((error[single] < EXACT).sum()),
              int(single.sum()), "theory: 1")
    )  # fmt: skip
    measures.append(figure(f"{case}: seconds of the client", trained, "s", "one thread"))
    g_w, g_b = (view.update.tensors[f"block.first.{n}"] for n in ("weight", "bias"))
    thresholds = key["edges"][:-1]

    def block() -> Tensor:
        return readout.cumulative_readout(g_w, g_b, thresholds).x

    return measures + cost(case, view, attack, block, g_w)


def loki(
    folder: Folder, size: int, epochs: int, *, secure: bool, clients: int = 100
) -> tuple[Measures, View]:
    """[33]: 100 clients of 8 images, 32 bins each, one sum."""
    if size == 32:
        data = folder.cifar("test", 9_000)
        victims, public = data.subset(range(8 * clients)), data.subset(range(8_000, 9_000))
    else:
        data = folder.photos(size)
        victims, public = data.subset(range(8 * clients)), data.subset(range(800, len(data)))
    how = "secure sum" if secure else "plain sum"
    case = f"loki 3x{size}x{size}, {clients} clients x 8, E={epochs}, {how}"
    attack = replace(LOKI.tuned(), bins=32)
    set_up = staged(
        convnet(size, len(data.classes)), victims, public, clients=clients,
        protocol=FedAVG(epochs=epochs, batch_size=8, lr=1e-2),
    )  # fmt: skip
    total = Summed(clients) if secure else Plain(clients)
    view, trained = lean_round(set_up, attack, total)
    found = attack(view)
    error = scores(found.images, victims.images)
    h = victims.images.double().flatten(1).mean(dim=1)
    single = torch.cat([alone(part, view.key["edges"].double()) for part in h.split(8)])
    note = (
        f"ConvNet behind, anchor channel, kappa {attack.kappa:g}, 4 bins an image, float32; "
        f"thresholds from {len(public)} other images"
    )
    measures = quality(case, error, note)
    measures.append(occupancy(case, 8, 32, clients))
    count = int(single.sum())
    measures.append(share(f"{case}: alone in a bin", count, len(error), "from the true brightness"))
    measures.append(
        share(f"{case}: of those recovered exactly", int((error[single] < EXACT).sum()), count,
              "theory: 1")
    )  # fmt: skip
    measures.append(
        figure(f"{case}: seconds of the round", trained, "s", "all clients in turn, one thread")
    )
    if isinstance(total, Summed):
        note = f"to [-{total.defense.clip_range}, {total.defense.clip_range}]"
        measures.append(mean(f"{case}: share of entries clipped", total.clipped, "share", note))
        keystream = Ring(64)
        words = 4 * MIB
        rate = words * 8 / min(seconds(lambda: expand(bytes(32), words, keystream)) for _ in "123")
        numel = sum(t.numel() for t in view.update.tensors.values())
        # every client expands a mask for each other one and its own, the server once more the own
        needed = (clients * clients + clients) * numel * 8
        measures.append(
            figure(f"{case}: seconds that the masks would take", needed / rate, "s",
                   f"ChaCha20 at {rate / 1e9:.2f} GB/s, measured; {needed / 1e9:.0f} GB of "
                   "keystream for all clients; they are left out and cancel exactly")
        )  # fmt: skip
    weight = view.update.tensors["block.first.weight"]

    def block() -> Tensor:
        parts = [
            attack.read_block(b, view.key["edges"], Box.unit(3), (3, size, size))[0].flatten(1)
            for b in attack.blocks(view, -1, (3, size, size))
        ]
        return torch.cat(parts)

    return measures + cost(case, view, attack, block, weight), view


def masked(folder: Folder) -> Measures:
    """The whole protocol, masks included, against the ring sum that the large case uses."""
    clients = 6
    data = folder.cifar("test", 9_000)
    victims, public = data.subset(range(8 * clients)), data.subset(range(8_000, 9_000))
    attack = replace(LOKI.tuned(), bins=32)
    protocol = FedAVG(epochs=5, batch_size=8, lr=1e-2)
    plain = staged(convnet(32), victims, public, clients=clients, protocol=protocol)
    scenario = replace(plain.scenario, defenses=(SecureAggregation(ring_bits=64),))
    full = stage(scenario, model=convnet(32), victims=victims, surrogate=public, box=Box.unit(3))
    trial = run_trial(full, attack)
    record, total = trial.records[0], Summed(clients)
    for member, update in record.updates.items():
        client = full.federation.clients[member]
        generator = stream(scenario.seed, "client", member, total.defense.key, 0)  # same rounding
        total.add(
            update,
            ClientContext(
                member, 0, record.received[member], client.x, client.y, protocol, generator, {}
            ),
        )
    summed = total.mean(replace(record.aggregate, tensors={}), clients).tensors
    differing = sum(
        int((summed[name] != tensor).sum()) for name, tensor in record.aggregate.tensors.items()
    )
    error = scores(trial.images, victims.images)
    note = f"loki, {clients} clients x 8, 3x32x32, E=5, the whole protocol with masks"
    return [
        figure("ring sum against secure aggregation with masks: entries that differ",
               float(differing), "", f"of {sum(t.numel() for t in summed.values())}; {note}"),
        share("loki through masks: recovered exactly", int((error < EXACT).sum()), len(error),
              note),
    ]  # fmt: skip


def scale_mia(folder: Folder) -> Measures:
    """[36]: a batch of 1,024 through 1,024 bins of the latent space."""
    victims, public = folder.cifar("test", 1_024), folder.cifar("train", 5_000)
    torch.manual_seed(0)
    model = Victim()
    attack = replace(ScaleMIA.tuned(), epochs=12)
    case = "scale_mia 3x32x32, batch 1,024, 1,024 bins"
    view, trained = lean_round(staged(model, victims, public), attack, Plain(1))
    found: Reconstruction = attack(view)
    # the client's model is the tampered one; its encoder gives the true latents, for scoring only
    tampered = staged(model, victims, public)
    again = attack.tamper(tampered.view(), generator=stream(attack.key, "tamper", 0), watch=Watch())
    assert again is not None and isinstance(again.sent, TamperedModel)
    sent = again.sent.build(model, pixels=3 * 32 * 32)
    parts = find_parts(sent, victims.images[:1])
    with torch.no_grad():
        z = torch.cat([encode(parts, x) for x in victims.images.split(256)])
    edges = view.key["thresholds"]
    bins = torch.bucketize(z.mean(dim=1), edges)
    single = (bins > 0) & ((bins[:, None] == bins).sum(dim=1) == 1)
    own = decode(z, view.key, Box.unit(3), (3, 32, 32))
    error = scores(found.images, victims.images)
    latent = scores(found.images, own)
    psnr, ceiling = (
        decibels(error),
        decibels((own - victims.images).double().square().flatten(1).mean(dim=1).sqrt()),
    )
    null = decibels(
        (public.images.mean(dim=0) - victims.images).double().square().flatten(1).mean(1).sqrt()
    )
    note = "latent 1,024, FedSGD, float32; autoencoder on 5,000 training images, 12 epochs"
    count = int(single.sum())
    g_w, g_b = (view.update.tensors[f"{parts.names[0]}.{n}"] for n in ("weight", "bias"))

    def block() -> Tensor:
        return readout.cumulative_readout(g_w, g_b, edges).x

    return [
        share(f"{case}: latents recovered exactly", int((latent < EXACT).sum()), 1_024,
              f"the candidate is that image's own decoded latent; {note}"),
        occupancy(case, 1_024, 1_024),
        share(f"{case}: alone in a bin", count, 1_024, "from the true latents"),
        share(f"{case}: of those recovered exactly", int((latent[single] < EXACT).sum()), count,
              "theory: 1"),
        share(f"{case}: success (psnr > 18)", int((psnr > 18).sum()), 1_024, note),
        share(f"{case}: success of the public mean image", int((null > 18).sum()), 1_024, note),
        mean(f"{case}: mean psnr of all", psnr.tolist(), "dB", "a missing image counts as 0 dB"),
        mean(f"{case}: mean psnr of those alone", psnr[single].tolist(), "dB", note),
        mean(f"{case}: mean psnr of the autoencoder", ceiling.tolist(), "dB", "the ceiling"),
        mean(f"{case}: mean psnr of the public mean image", null.tolist(), "dB", "null baseline"),
        figure(f"{case}: seconds of the client", trained, "s", "one thread"),
        *cost(case, view, attack, block, g_w),
    ]  # fmt: skip


def spear(folder: Folder, batch: int, trials: int) -> Measures:
    """[27]: whole batches in float64, six linear layers of width 400."""
    data = folder.cifar("test", 200)
    attack = SPEAR(samples=max(100_000, int(12 * expected_samples(batch))), chunk=20_000)
    exact, wrong, spent, drawn = 0, 0, [], []
    for seed in range(trials):
        victims = data.subset(range(seed * batch, (seed + 1) * batch))
        settings = {"size": 32, "classes": 10, "seed": seed, "widths": (400,) * 5}
        reference = ModelRef("builtin", "fc", settings)
        scenario = Scenario(model=reference, letter="A", examples=batch, seed=seed)
        scene = stage(scenario, model=reference.build().double(), victims=victims, box=CIFAR10)
        trial = run_trial(scene, attack, seed=seed)
        cost = pairwise_mse(trial.images.double(), victims.images.double())
        matched = assign(cost).of_original
        error = [math.inf if c is None else float(cost[c, i]) ** 0.5 for i, c in enumerate(matched)]
        whole = max(error) < EXACT_DOUBLE
        certified = trial.found.status == "complete"
        exact += whole and certified
        wrong += certified and not whole
        spent.append(trial.found.seconds)
        drawn.append(trial.found.notes["samples"])
    expected = expected_samples(batch)
    case = f"spear b={batch}"
    note = (
        f"CIFAR-10, normalised, 400 rows, float64; at most {attack.samples} row sets; certified "
        f"but inexact: {wrong}"
    )
    return [
        share(f"{case}: batches recovered whole", exact, trials, note),
        mean(f"{case}: seconds", spent, "s", "one thread, failures included"),
        mean(f"{case}: row sets over 2^(b-1) H_b", [d / expected for d in drawn], "x",
             f"{expected:.3g} expected of independent ones"),
    ]  # fmt: skip


CASES: dict[str, Callable[[Folder], Measures]] = {
    "robbing_the_fed": lambda folder: robbing_the_fed(folder, "empirical"),
    "robbing_the_fed-normal": lambda folder: robbing_the_fed(folder, "normal"),
    "loki-32": lambda folder: loki(folder, 32, 5, secure=True)[0],
    "loki-64": lambda folder: loki(folder, 64, 1, secure=False)[0],
    "masked": masked,
    "scale_mia": scale_mia,
    "spear-4": lambda folder: spear(folder, 4, 10),
    "spear-8": lambda folder: spear(folder, 8, 10),
    "spear-12": lambda folder: spear(folder, 12, 10),
    "spear-16": lambda folder: spear(folder, 16, 10),
    "spear-18": lambda folder: spear(folder, 18, 5),
    "spear-20": lambda folder: spear(folder, 20, 1),
}


def one_case(name: str, folder: Folder) -> Measures:
    """One case, and what the whole of it took."""
    begun = time.perf_counter()
    measures = CASES[name](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    note = "client, server and scoring in one process"
    return [
        *measures,
        figure(f"{name}: peak memory of the process", peak, "MiB", note),
        figure(f"{name}: seconds of the whole case", time.perf_counter() - begun, "s", note),
    ]


def main() -> None:
    """Run the chosen cases, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.into:
        measures = one_case(options.cases[0], Folder(options.data))
        options.into.write_text(json.dumps(measures), encoding="utf-8")
        return
    path = options.results / "scale.json"
    held: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    by_case: dict[str, Measures] = held.get("recipe", {}).get("cases", {}) and {
        case: [m for m in held["measures"] if m["name"] in names]
        for case, names in held["recipe"]["cases"].items()
    }
    for case in options.cases:
        with tempfile.TemporaryDirectory() as scratch:
            into = Path(scratch) / "measures.json"
            command = [sys.executable, __file__, case, "--data", str(options.data)]
            subprocess.run([*command, "--into", str(into)], check=True, env=os.environ | KEEP_PAGES)
            by_case[case] = json.loads(into.read_text("utf-8"))
        ordered = {name: by_case[name] for name in CASES if name in by_case}
        result = {
            "schema": "leakatlas/result/1",
            "kind": "benchmark",
            "key": "scale",
            "code_version": 1,
            "recipe": {
                "attacks": {
                    a.key: {"version": a.version, **a.to_json()}
                    for a in (RobbingTheFed(bins=1_024), replace(LOKI.tuned(), bins=32),
                              replace(ScaleMIA.tuned(), epochs=12), SPEAR(chunk=20_000))
                },
                "data": "CIFAR-10 and ImageNet sample photos, pixels in [0, 1]",
                "cases": {name: [m["name"] for m in part] for name, part in ordered.items()},
            },
            "hardware": f"2 CPU cores shared with other work, one thread, {platform.machine()}, "
            "no GPU",
            "seeds": [0],
            "measures": [m for part in ordered.values() for m in part],
            "command": "python benchmarks/scale.py --data FOLDER",
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
