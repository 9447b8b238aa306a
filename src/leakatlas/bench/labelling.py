"""Label rules on batches, without any attack: IRec, the multiset overlap with the true labels.

A rule that refuses a batch scores 0 there, and is counted. ``even-spread`` reads no update: no rule
below it has recovered anything. Rules that read no head are given none of its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import LabelBatches, OwnMeasure, SyntheticHead
from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Evidence, Head, HeadPass
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import FedAVG, replay
from leakatlas.metrics import counts_of, irec

EVEN, REFUSALS = "even-spread", "refusals"
Batches = Iterator[tuple[Evidence, Tensor]]
"""What an adversary holds of a batch, and the true counts."""


def measure(cell: Cell) -> dict[str, list[float]]:
    """IRec of every rule of the case on every batch, and how many rules refused the batch."""
    assert cell.case.labelling is not None
    wanted = {m.name: m.computes for m in cell.case.measures if isinstance(m, OwnMeasure)}
    rules = [rule for rule in wanted.values() if rule != REFUSALS]
    found: dict[str, list[float]] = {rule: [] for rule in wanted.values()}
    synthetic = cell.case.labelling.synthetic
    for evidence, true in _images(cell) if synthetic is None else _synthetic(cell, synthetic):
        scores = [_score(rule, evidence, true) for rule in rules]
        for rule, score in zip(rules, scores, strict=True):
            found[rule].append(score or 0.0)
        if REFUSALS in found:
            found[REFUSALS].append(float(scores.count(None)))
    return {name: found[rule] for name, rule in wanted.items()}


def _score(rule: str, held: Evidence, true: Tensor) -> float | None:
    """None if the rule refuses."""
    size = int(true.sum())
    if rule == EVEN:
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


def _drawn(wanted: LabelBatches, y: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Indices of a batch: of distinct classes, of any, or of one."""
    order = torch.randperm(len(y), generator=generator)
    if wanted.draw == "any":
        return order[:batch]
    classes = torch.randperm(int(y.max()) + 1, generator=generator)
    if wanted.draw == "one class":
        return order[y[order] == classes[0]][:batch]
    return torch.stack([order[y[order] == c][0] for c in classes[:batch]])


def _images(cell: Cell) -> Batches:
    """One gradient of a batch, or a client's local steps on it."""
    case, wanted = cell.case, cell.case.labelling
    assert wanted is not None
    victims = scene.images(case.victims, cell.data)
    x = scene.pixel_space(case, victims.channels).normalize(victims.images)
    generator = _seeded(1_000 * cell.seed + case.batch)
    known: Adversary | None = None
    for number in range(wanted.batches):
        if known is None or wanted.anew:
            known = Adversary(replace(cell, seed=number) if wanted.anew else cell, x[:1])
        first = number * case.batch
        pick = torch.arange(first, first + case.batch)
        if wanted.draw != "in order":
            pick = _drawn(wanted, victims.labels, case.batch, generator)
        y = victims.labels[pick]
        yield known.evidence(x[pick], y), counts_of(y, known.head.classes)


class Adversary:
    """What is known of a network before any update: dummies, and public images where there are.

    Args:
        cell: Gives the network, the protocol and the public images.
        example: One input, for the shapes.
    """

    def __init__(self, cell: Cell, example: Tensor) -> None:
        assert cell.case.labelling is not None
        self.cell, self.model, self.dummies = cell, _network(cell), cell.case.labelling.dummies
        self.protocol = scene.protocol(cell.case)
        self.parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        self.head = labels.find_head(self.model, example)
        size = (self.dummies, *example.shape[1:])
        self.noise = torch.randn(size, generator=_seeded(cell.seed))
        self.steps, self.lr = 1, 1.0
        if isinstance(self.protocol, FedAVG):
            per_epoch = cell.case.batch // self.protocol.batch_size
            self.steps, self.lr = self.protocol.epochs * per_epoch, self.protocol.lr
        self.known = self._known()

    def _known(self) -> Evidence:
        model, head, case = self.model, self.head, self.cell.case
        weights = self.parameters
        known = Evidence(
            gradients={}, head=head, batch_size=case.batch,
            weight=weights[head.weight_name],
            bias=None if head.bias_name is None else weights[head.bias_name],
            dummy=labels.head_pass(model, head, self.noise) if self.dummies else None,
        )  # fmt: skip
        if isinstance(self.protocol, FedAVG):
            known = replace(known, steps=self.steps)
        if case.surrogate is None:
            return known
        public = scene.images(case.surrogate, self.cell.data)
        shown = scene.pixel_space(case, public.channels).normalize(public.images)
        if isinstance(self.protocol, FedAVG):
            passes = labels.simulated_passes(
                model, head, shown, public.labels, steps=self.steps, lr=self.lr,
                batch_size=self.protocol.batch_size, generator=_seeded(self.cell.seed),
            )  # fmt: skip
            return replace(known, public=tuple(passes))
        below = weights.keys() - {head.weight_name, head.bias_name}
        return replace(
            known,
            public=labels.head_pass(model, head, shown, public.labels),
            bridge=labels.build_bridge(model, head, shown, shared=below),
        )

    def evidence(self, x: Tensor, y: Tensor) -> Evidence:
        """The same with the update of a batch."""
        weights, buffers = self.parameters, dict(self.model.named_buffers())
        sent = replay.simulate_client(self.model, weights, buffers, x, y, self.protocol)
        # Some rules draw: alike every time.
        mine = replace(self.known, generator=_seeded(self.cell.seed))
        if isinstance(self.protocol, FedAVG):
            after = {n: weights[n] + sent[n].detach() for n in weights}
            sent = labels.mean_from_delta(weights, after, lr=self.lr, steps=self.steps)
            end = labels.head_pass(self.model, self.head, self.noise, weights=after)
            mine = replace(mine, dummy_end=end)
        return replace(mine, gradients={n: t.detach() for n, t in sent.items()})


def _network(cell: Cell) -> nn.Module:
    return scene.network(cell)[1].train(scene.protocol(cell.case).mode == "train")


FEATURES, SPREAD = 128, 1.5


def _synthetic(cell: Cell, told: SyntheticHead) -> Batches:
    """A head over rectified Gaussian features with class means; no network."""
    case = cell.case
    assert case.labelling is not None
    classes, generator = told.classes, _seeded(3_000 + cell.seed)
    means = torch.randn(classes, FEATURES, generator=generator)
    weight = torch.randn(classes, FEATURES, generator=generator) / FEATURES**0.5
    if told.aligned:  # rows point at their class's rectified mean
        direction = means.clamp(min=0) - means.clamp(min=0).mean(dim=0)
        weight = 8 * direction / direction.square().sum(dim=1, keepdim=True)

    def seen(y: Tensor) -> HeadPass:
        h = (means[y] + SPREAD * torch.randn(len(y), FEATURES, generator=generator)).clamp(min=0)
        return HeadPass(features=h, logits=h @ weight.T, labels=y)

    public = seen(torch.arange(4_000) % classes)
    noise = SPREAD * torch.randn(case.labelling.dummies, FEATURES, generator=generator)
    noise = noise.clamp(min=0)
    for _ in range(case.labelling.batches):
        y = torch.randint(0, classes, (case.batch,), generator=generator)
        y = y[:1].repeat(case.batch) if case.labelling.draw == "one class" else y
        client = seen(y)
        residual = client.logits.softmax(dim=1) - F.one_hot(y, classes)
        yield Evidence(
            gradients={"w": residual.T @ client.features / case.batch, "b": residual.mean(dim=0)},
            head=Head(weight_name="w", bias_name="b", in_features=FEATURES, classes=classes),
            batch_size=case.batch, weight=weight, bias=torch.zeros(classes),
            dummy=HeadPass(features=noise, logits=noise @ weight.T), public=public,
            generator=_seeded(cell.seed),
        ), counts_of(y, classes)  # fmt: skip
