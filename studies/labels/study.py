"""Every label rule on the same batches: IRec, the multiset overlap with the true labels.

A rule that refuses a batch scores 0 there, and is counted. ``even-spread`` reads no update: no rule
below it has recovered anything. Rules that read no head are given none of its gradient.

Dummy inputs are N(0, 1); public digits are neither victims nor training data. The synthetic
features are rectified Gaussians with class means, under a random head and under one aligned with
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Evidence, Head, HeadPass
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.metrics import counts_of, irec

TRIALS = 10
CLASSES, LR, LOCAL = 10, 0.1, 4
FEATURES, SPREAD = 128, 1.5
EPOCHS = {"untrained": 0, "trained": 30}
REFUSALS = "refusals"
Batches = Iterator[tuple[Evidence, Tensor]]
"""What an adversary holds of a batch, and the true counts."""


def measure(cell: Cell) -> dict[str, list[float]]:
    """IRec of every rule of the case on every batch, and how many rules refused the batch."""
    torch.set_num_threads(1)
    names = [m if isinstance(m, str) else m.name for m in cell.case.measures]
    found: dict[str, list[float]] = {name: [] for name in names}
    for evidence, true in _batches(cell):
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


def _batches(cell: Cell) -> Batches:
    match cell.label.split("/"):
        case ["synthetic", _, state, classes, _, draw]:
            return _synthetic(state, int(classes.removeprefix("K=")), draw, cell.seed)
        case ["digits-fedavg", _, state, *_]:
            return _fedavg(cell, state)
        case [_, _, state, batch, draw]:
            return _fedsgd(cell, state, int(batch.removeprefix("B=")), draw)
    raise InvalidInput(f"The study of labels knows no case like {cell.label!r}.")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Digits:
    """A network trained on some digits, public ones, and the victims'."""

    model: nn.Module
    public: tuple[Tensor, Tensor]
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, cell: Cell, state: str) -> Digits:
        """With a network of that state."""
        found = scene.images(cell.case.victims, cell.data)
        x, y = (found.images - found.images.mean()) / found.images.std(), found.labels
        order = torch.randperm(len(x), generator=_seeded(0))
        train, public, victims = order.split([700, 400, len(x) - 1100])
        model, generator = scene.network(cell)[1], _seeded(cell.seed)
        for _ in range(EPOCHS[state]):
            for pick in torch.randperm(700, generator=generator).split(32):
                _step(model, x[train[pick]], y[train[pick]])
        return cls(model, (x[public], y[public]), x[victims], y[victims])

    def draw(self, kind: str, batch: int, generator: torch.Generator) -> Tensor:
        """Indices of a batch: distinct classes, any samples, or samples of one class."""
        order = torch.randperm(len(self.y), generator=generator)
        if kind == "random":
            return order[:batch]
        wanted = torch.randperm(CLASSES, generator=generator)
        if kind == "single":
            return order[self.y[order] == wanted[0]][:batch]
        return torch.stack([order[self.y[order] == c][0] for c in wanted[:batch]])

    def evidence(self, gradients: dict[str, Tensor], batch: int, seed: int) -> Evidence:
        """All that rules may use beside the update."""
        head = labels.find_head(self.model)
        weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        noise = torch.randn(400, 64, generator=_seeded(seed)).reshape(400, 1, 8, 8)
        return Evidence(
            gradients=gradients, head=head, batch_size=batch,
            weight=weights[head.weight_name], bias=weights[str(head.bias_name)],
            dummy=labels.head_pass(self.model, head, noise),
            public=labels.head_pass(self.model, head, *self.public), generator=_seeded(seed),
        )  # fmt: skip


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    held = dict(model.named_parameters())
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(held.values()))
    return dict(zip(held, found, strict=True))


def _step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    found = _gradients(model, x, y)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(LR * found[name])


def _fedsgd(cell: Cell, state: str, batch: int, draw: str) -> Batches:
    data, generator = Digits.of(cell, state), _seeded(1_000 * cell.seed + batch)
    plain = data.evidence({}, batch, cell.seed)
    below = {n for n, _ in data.model.named_parameters()}
    below -= {plain.head.weight_name, str(plain.head.bias_name)}
    bridge = labels.build_bridge(data.model, plain.head, data.public[0], shared=below)
    for _ in range(TRIALS):
        pick = data.draw(draw, batch, generator)
        sent = _gradients(data.model, data.x[pick], data.y[pick])
        # Some rules draw: on every batch from the same state.
        held = replace(plain, gradients=sent, bridge=bridge, generator=_seeded(cell.seed))
        yield held, counts_of(data.y[pick], CLASSES)


def _fedavg(cell: Cell, state: str) -> Batches:
    """Two epochs of two batches of 16 on 32 samples."""
    generator = _seeded(2_000 + cell.seed)
    for _ in range(TRIALS):
        data = Digits.of(cell, state)
        model, held = data.model, data.evidence({}, 32, cell.seed)
        passes = labels.simulated_passes(
            model, held.head, *data.public, steps=LOCAL, lr=LR, batch_size=16,
            generator=_seeded(cell.seed),
        )  # fmt: skip
        before = {k: v.detach().clone() for k, v in model.named_parameters()}
        pick = data.draw("random", 32, generator)
        for step in range(LOCAL):
            part = pick[16 * (step % 2) : 16 * (step % 2) + 16]
            _step(model, data.x[part], data.y[part])
        after = {k: v.detach().clone() for k, v in model.named_parameters()}
        end = data.evidence({}, 32, cell.seed).dummy
        yield replace(
            held, gradients=labels.mean_from_delta(before, after, lr=LR, steps=LOCAL),
            steps=LOCAL, dummy_end=end, public=tuple(passes),
        ), counts_of(data.y[pick], CLASSES)  # fmt: skip


def _synthetic(state: str, classes: int, draw: str, seed: int) -> Batches:
    batch, generator = 32 if classes == 10 else 24, _seeded(3_000 + seed)
    means = torch.randn(classes, FEATURES, generator=generator)
    weight = torch.randn(classes, FEATURES, generator=generator) / FEATURES**0.5
    if state == "trained":  # rows point at their class's rectified mean
        direction = means.clamp(min=0) - means.clamp(min=0).mean(dim=0)
        weight = 8 * direction / direction.square().sum(dim=1, keepdim=True)

    def seen(y: Tensor) -> HeadPass:
        h = (means[y] + SPREAD * torch.randn(len(y), FEATURES, generator=generator)).clamp(min=0)
        return HeadPass(features=h, logits=h @ weight.T, labels=y)

    public = seen(torch.arange(4_000) % classes)
    noise = (SPREAD * torch.randn(400, FEATURES, generator=generator)).clamp(min=0)
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
            generator=_seeded(seed),
        ), counts_of(y, classes)  # fmt: skip
