"""Every label rule on the same batches: IRec, the multiset overlap with the true labels.

A rule that refuses a batch scores 0 there, and is counted. ``even-spread`` reads no update: no rule
below it has recovered anything. Rules that read no head are given none of its gradient.

Dummy inputs are N(0, 1); public digits are neither victims nor training data. The synthetic
features are rectified Gaussians with class means, under a random head and under one aligned with
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import OwnMeasure
from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Evidence, Head, HeadPass
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import FedAVG, replay
from leakatlas.metrics import counts_of, irec

TRIALS, CLASSES, DUMMIES = 10, 10, 400
FEATURES, SPREAD = 128, 1.5
REFUSALS = "refusals"
Batches = Iterator[tuple[Evidence, Tensor]]
"""What an adversary holds of a batch, and the true counts."""


def measure(cell: Cell) -> dict[str, list[float]]:
    """IRec of every rule of the case on every batch, and how many rules refused the batch."""
    names = [m.name for m in cell.case.measures if isinstance(m, OwnMeasure)]
    found: dict[str, list[float]] = {name: [] for name in names}
    batches = _synthetic if cell.label.startswith("synthetic") else _digits
    for evidence, true in batches(cell):
        scores = {rule: _score(rule, evidence, true) for rule in names if rule != REFUSALS}
        for rule, score in scores.items():
            found[rule].append(score or 0.0)
        found[REFUSALS].append(float(sum(score is None for score in scores.values())))
    return found


def _score(rule: str, held: Evidence, true: Tensor) -> float | None:
    """None if the rule refuses."""
    size = int(true.sum())
    if rule == "even-spread":
        return irec(labels.round_counts(torch.zeros(len(true)), size), true)
    if not METHODS[rule].reads_head:
        own = (held.head.weight_name, held.head.bias_name)
        sent = {n: t for n, t in held.gradients.items() if n not in own}
        held = replace(held, gradients=sent)
    try:
        found = labels.as_multiset(labels.recover(rule, held), size)
    except (InvalidInput, UnsupportedModel):
        return None
    return irec(counts_of(found.labels, len(true)), true)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _drawn(kind: str, y: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Indices of a batch: distinct classes, any samples, or samples of one class."""
    order = torch.randperm(len(y), generator=generator)
    if kind == "random":
        return order[:batch]
    wanted = torch.randperm(CLASSES, generator=generator)
    if kind == "single":
        return order[y[order] == wanted[0]][:batch]
    return torch.stack([order[y[order] == c][0] for c in wanted[:batch]])


def _digits(cell: Cell) -> Batches:
    """One gradient of a batch, or two local epochs of two batches."""
    case, kind = cell.case, cell.label.rpartition("/")[2]
    assert case.surrogate is not None
    victims, public = (scene.images(s, cell.data) for s in (case.victims, case.surrogate))
    box = scene.pixel_space(case, victims.channels)
    x, y, shown = box.normalize(victims.images), victims.labels, box.normalize(public.images)
    stage = scene.staged(cell)
    model, protocol = stage.federation.model, stage.scenario.protocol
    held = {n: p.detach() for n, p in model.named_parameters()}
    head, steps, lr = labels.find_head(model, x[:1]), 1, 1.0
    if isinstance(protocol, FedAVG):
        steps, lr = protocol.epochs * case.batch // protocol.batch_size, protocol.lr
    noise = torch.randn(DUMMIES, *x.shape[1:], generator=_seeded(cell.seed))
    below = held.keys() - {head.weight_name, head.bias_name}
    bridge = labels.build_bridge(model, head, shown, shared=below)
    known = Evidence(
        gradients={}, head=head, batch_size=case.batch, weight=held[head.weight_name],
        bias=held[str(head.bias_name)], dummy=labels.head_pass(model, head, noise),
        public=labels.head_pass(model, head, shown, public.labels), bridge=bridge,
    )  # fmt: skip
    if isinstance(protocol, FedAVG):
        passes = labels.simulated_passes(
            model, head, shown, public.labels, steps=steps, lr=lr,
            batch_size=protocol.batch_size, generator=_seeded(cell.seed),
        )  # fmt: skip
        known = replace(known, steps=steps, public=tuple(passes), bridge=None)
    generator = _seeded(1_000 * cell.seed + case.batch)
    for _ in range(TRIALS):
        pick = _drawn(kind, y, case.batch, generator)
        sent = replay.simulate_client(model, held, {}, x[pick], y[pick], protocol)
        mine = replace(known, generator=_seeded(cell.seed))  # some rules draw: alike every time
        if isinstance(protocol, FedAVG):
            after = {n: held[n] + sent[n].detach() for n in held}
            sent = labels.mean_from_delta(held, after, lr=lr, steps=steps)
            mine = replace(mine, dummy_end=labels.head_pass(model, head, noise, weights=after))
        gradients = {n: t.detach() for n, t in sent.items()}
        yield replace(mine, gradients=gradients), counts_of(y[pick], CLASSES)


def _synthetic(cell: Cell) -> Batches:
    _, _, state, many, _, draw = cell.label.split("/")
    classes, generator = int(many.removeprefix("K=")), _seeded(3_000 + cell.seed)
    batch = cell.case.batch
    means = torch.randn(classes, FEATURES, generator=generator)
    weight = torch.randn(classes, FEATURES, generator=generator) / FEATURES**0.5
    if state == "trained":  # rows point at their class's rectified mean
        direction = means.clamp(min=0) - means.clamp(min=0).mean(dim=0)
        weight = 8 * direction / direction.square().sum(dim=1, keepdim=True)

    def seen(y: Tensor) -> HeadPass:
        h = (means[y] + SPREAD * torch.randn(len(y), FEATURES, generator=generator)).clamp(min=0)
        return HeadPass(features=h, logits=h @ weight.T, labels=y)

    public = seen(torch.arange(4_000) % classes)
    noise = (SPREAD * torch.randn(DUMMIES, FEATURES, generator=generator)).clamp(min=0)
    for _ in range(TRIALS):
        y = torch.randint(0, classes, (batch,), generator=generator)
        y = y[:1].repeat(batch) if draw == "single" else y
        client = seen(y)
        residual = client.logits.softmax(dim=1) - F.one_hot(y, classes)
        yield Evidence(
            gradients={"w": residual.T @ client.features / batch, "b": residual.mean(dim=0)},
            head=Head(weight_name="w", bias_name="b", in_features=FEATURES, classes=classes),
            batch_size=batch, weight=weight, bias=torch.zeros(classes),
            dummy=HeadPass(features=noise, logits=noise @ weight.T), public=public,
            generator=_seeded(cell.seed),
        ), counts_of(y, classes)  # fmt: skip
