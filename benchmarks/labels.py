"""How well every label rule does, and where it stops: the study behind the label table.

    python benchmarks/labels.py [--trials 10] [--out results/labels.json]

Every counting, multiset and set rule meets (untrained, trained) x (batch below and above the number
of classes) x (distinct, random, one class) x activations, on a small network over scikit-learn's
digits and on synthetic features; FedAVG updates and single samples have rows of their own. The
value is IRec, the multiset overlap with the true labels; ``even-spread`` is what it is without any
update. A rule that refuses a case scores 0 there, and the note says how often it refused, how often
the whole batch was right, and how many labels were padded.

Victims are held out from training. Dummy inputs are N(0, 1); public data are digits that are
neither victims nor training data.

Where the head's gradient is withheld, the one rule that reads the layers below it stands alone
beside the null baseline; every other rule would refuse. ``--only gdbr`` runs these cells again and
keeps the others of the result file: no cell's batches depend on another's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.blocks import labels
from leakatlas.blocks.labels import METHODS, Evidence, Head, HeadPass
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.metrics import bootstrap, counts_of, irec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
STATES = {"untrained": 0, "trained": 30}
"""Epochs of training on digits."""
DRAWS = ("distinct", "random", "single")
SEEDS = (0, 1, 2)
SINGLE = ("idlg", "idlg-sum", "idlg-paper", "fc-ratio")
"""Rules for one sample."""
FEDAVG = ("dimitrov", "dimitrov-bias")
WITHHELD = tuple(key for key, method in METHODS.items() if not method.reads_head)
"""Rules for updates without the head's gradient."""
BATCH = tuple(key for key in METHODS if key not in (*SINGLE, *FEDAVG, *WITHHELD, "rgap"))
NULL = "even-spread"
"""The null baseline: every class equally often. No rule below it has recovered anything."""
CLASSES, WIDTH, LR, LOCAL = 10, 64, 0.1, 4
FEATURES, SPREAD = 128, 1.5


@dataclass(frozen=True)
class Digits:
    """Digits in [0, 1], normalised, split into training, public and victims' data."""

    train: tuple[Tensor, Tensor]
    public: tuple[Tensor, Tensor]
    victims: tuple[Tensor, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits() -> Digits:
    found = load_digits()
    x = torch.from_numpy(found.data).float() / 16
    x = (x - x.mean()) / x.std()
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=seeded(0))
    parts = [(x[part], y[part]) for part in order.split([700, 400, len(x) - 1100])]
    return Digits(*parts)


def network(activation: str, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        act = ACTIVATIONS[activation]
        return nn.Sequential(
            nn.Linear(64, WIDTH), act(), nn.Linear(WIDTH, WIDTH), act(), nn.Linear(WIDTH, CLASSES)
        )


def sgd(model: nn.Sequential, x: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
    """One step in place; the gradient that made it, by parameter name."""
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with torch.no_grad():
        for parameter, g in zip(model.parameters(), found, strict=True):
            parameter.sub_(lr * g)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def train(model: nn.Sequential, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> None:
    generator = seeded(seed)
    for _ in range(epochs):
        for pick in torch.randperm(len(data[0]), generator=generator).split(32):
            sgd(model, data[0][pick], data[1][pick], LR)


def draw(kind: str, y: Tensor, batch: int, classes: int, generator: torch.Generator) -> Tensor:
    """Indices of a batch: distinct classes, any samples, or samples of one class."""
    order = torch.randperm(len(y), generator=generator)
    if kind == "random":
        return order[:batch]
    wanted = torch.randperm(classes, generator=generator)
    if kind == "single":
        return order[y[order] == wanted[0]][:batch]
    return torch.stack([order[y[order] == c][0] for c in wanted[:batch]])


class Tally:
    """Collects one score a trial and turns them into measures."""

    def __init__(self, only: Iterable[str] = ()) -> None:
        self.only = set(only)
        self.scores: dict[str, list[float]] = {}
        self.exact: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.padded: dict[str, int] = {}

    def add_all(self, keys: Iterable[str], setting: str, evidence: Evidence, true: Tensor) -> None:
        """Score every rule on one batch, beside the even spread that reads no update."""
        keys = [key for key in keys if not self.only or key in self.only]
        if not keys:
            return
        even = labels.round_counts(torch.zeros(len(true)), int(true.sum()))
        self._keep(f"irec/{NULL}/{setting}", irec(even, true), int(torch.equal(even, true)), 0, 0)
        for key in keys:
            self._add(key, setting, evidence, true)

    def _add(self, key: str, setting: str, evidence: Evidence, true: Tensor) -> None:
        name, batch = f"irec/{key}/{setting}", int(true.sum())
        score, exact, refused, padded = 0.0, 0, 0, 0
        try:
            found = labels.as_multiset(labels.recover(key, evidence), batch)
        except (InvalidInput, UnsupportedModel):
            refused = 1
        else:
            counts = counts_of(found.labels, len(true))
            score, padded = irec(counts, true), found.padded
            exact = int(torch.equal(counts, true))
        self._keep(name, score, exact, refused, padded)

    def _keep(self, name: str, score: float, exact: int, refused: int, padded: int) -> None:
        self.scores.setdefault(name, []).append(score)
        for store, value in ((self.exact, exact), (self.refused, refused), (self.padded, padded)):
            store[name] = store.get(name, 0) + value

    def measures(self) -> Iterator[dict[str, Any]]:
        """One measure a name, with a bootstrap interval of the mean."""
        for name, scores in self.scores.items():
            values, n = torch.tensor(scores, dtype=torch.float64), len(scores)
            low, high = bootstrap(values, generator=seeded(0))
            note = f"whole batch right in {self.exact[name]} of {n}"
            if self.refused[name]:
                note += f"; refused in {self.refused[name]}"
            if self.padded[name]:
                note += f"; {self.padded[name]} labels padded in all"
            yield {
                "name": name, "value": round(float(values.mean()), 4), "unit": "",
                "interval": [round(low, 4), round(high, 4)], "n": n, "note": note,
            }  # fmt: skip


def head_weights(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    last = model[-1]
    assert isinstance(last, nn.Linear)
    return last.weight.detach().clone(), last.bias.detach().clone()


def fedsgd(tally: Tally, data: Digits, trials: int) -> None:
    """Digits: activations x states x batch sizes x draws, and single samples."""
    for activation in ACTIVATIONS:
        for state, epochs in STATES.items():
            for seed in SEEDS:
                model = network(activation, seed)
                train(model, data.train, epochs, seed)
                head = labels.find_head(model)
                weight, bias = head_weights(model)
                dummy = labels.head_pass(model, head, torch.randn(400, 64, generator=seeded(seed)))
                public = labels.head_pass(model, head, *data.public)
                below = {n for n, _ in model.named_parameters()} - {
                    head.weight_name, head.bias_name
                }  # fmt: skip
                bridge = labels.build_bridge(model, head, data.public[0], shared=below)
                x, y = data.victims
                for batch, draws in {8: DRAWS, 32: DRAWS[1:], 1: ("random",)}.items():
                    for kind in draws:
                        setting = f"digits/{activation}/{state}/B={batch}/{kind}"
                        generator = seeded(1_000 * seed + batch)
                        for _ in range(trials):
                            pick = draw(kind, y, batch, CLASSES, generator)
                            loss = F.cross_entropy(model(x[pick]), y[pick])
                            found = torch.autograd.grad(loss, list(model.parameters()))
                            evidence = Evidence(
                                gradients=dict(
                                    zip(dict(model.named_parameters()), found, strict=True)
                                ),
                                head=head, batch_size=batch, weight=weight, bias=bias,
                                dummy=dummy, public=public, generator=seeded(seed),
                            )  # fmt: skip
                            true = counts_of(y[pick], CLASSES)
                            tally.add_all(SINGLE if batch == 1 else BATCH, setting, evidence, true)
                            restricted = replace(
                                evidence, bridge=bridge,
                                gradients={n: evidence.gradients[n] for n in below},
                            )  # fmt: skip
                            tally.add_all(WITHHELD, f"{setting}/head withheld", restricted, true)


def fedavg(tally: Tally, data: Digits, trials: int) -> None:
    """Digits, ReLU: two epochs of two batches of 16 on 32 samples."""
    for state, epochs in STATES.items():
        for seed in SEEDS:
            x, y = data.victims
            generator = seeded(2_000 + seed)
            for _ in range(trials):
                model = network("relu", seed)
                train(model, data.train, epochs, seed)
                head = labels.find_head(model)
                weight, bias = head_weights(model)
                noise = torch.randn(400, 64, generator=seeded(seed))
                dummy = labels.head_pass(model, head, noise)
                passes = labels.simulated_passes(
                    model, head, *data.public, steps=LOCAL, lr=LR, batch_size=16,
                    generator=seeded(seed),
                )  # fmt: skip
                before = {k: v.detach().clone() for k, v in model.named_parameters()}
                pick = draw("random", y, 32, CLASSES, generator)
                for step in range(LOCAL):
                    part = pick[16 * (step % 2) : 16 * (step % 2) + 16]
                    sgd(model, x[part], y[part], LR)
                after = {k: v.detach().clone() for k, v in model.named_parameters()}
                evidence = Evidence(
                    gradients=labels.mean_from_delta(before, after, lr=LR, steps=LOCAL),
                    head=head, batch_size=32, steps=LOCAL, weight=weight, bias=bias, dummy=dummy,
                    dummy_end=labels.head_pass(model, head, noise), public=tuple(passes),
                    generator=seeded(seed),
                )  # fmt: skip
                true = counts_of(y[pick], CLASSES)
                setting = f"digits-fedavg/relu/{state}/N=32/random"
                tally.add_all((*BATCH, *FEDAVG), setting, evidence, true)


def synthetic_pass(
    y: Tensor, means: Tensor, weight: Tensor, generator: torch.Generator
) -> HeadPass:
    """Rectified features scattered around the means of classes ``y``, seen by the head."""
    h = (means[y] + SPREAD * torch.randn(len(y), FEATURES, generator=generator)).clamp(min=0)
    return HeadPass(features=h, logits=h @ weight.T, labels=y)


def synthetic(tally: Tally, trials: int) -> None:
    """Rectified Gaussian features with class means; a random head, and one aligned with them."""
    for classes, batch in ((10, 32), (100, 24)):
        for state in STATES:
            for seed in SEEDS:
                generator = seeded(3_000 + seed)
                means = torch.randn(classes, FEATURES, generator=generator)
                weight = torch.randn(classes, FEATURES, generator=generator) / FEATURES**0.5
                if state == "trained":  # rows point at their class's rectified mean
                    direction = means.clamp(min=0) - means.clamp(min=0).mean(dim=0)
                    weight = 8 * direction / direction.square().sum(dim=1, keepdim=True)
                bias = torch.zeros(classes)
                head = Head(weight_name="w", bias_name="b", in_features=FEATURES, classes=classes)
                public = synthetic_pass(torch.arange(4_000) % classes, means, weight, generator)
                noise = (SPREAD * torch.randn(400, FEATURES, generator=generator)).clamp(min=0)
                dummy = HeadPass(features=noise, logits=noise @ weight.T)
                for kind in ("random", "single"):
                    setting = f"synthetic/relu/{state}/K={classes}/B={batch}/{kind}"
                    for _ in range(trials):
                        y = torch.randint(0, classes, (batch,), generator=generator)
                        y = y[:1].repeat(batch) if kind == "single" else y
                        client = synthetic_pass(y, means, weight, generator)
                        residual = client.logits.softmax(dim=1) - F.one_hot(y, classes)
                        gradients = {
                            "w": residual.T @ client.features / batch, "b": residual.mean(dim=0)
                        }  # fmt: skip
                        evidence = Evidence(
                            gradients=gradients, head=head, batch_size=batch, weight=weight,
                            bias=bias, dummy=dummy, public=public, generator=seeded(seed),
                        )  # fmt: skip
                        tally.add_all(BATCH, setting, evidence, counts_of(y, classes))


def merged(
    old: dict[str, Any], new: dict[str, Any], measures: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The old file's measures with the new ones in their place, or after them.

    Raises:
        InvalidInput: If the old file rests on another recipe.
    """
    if old["recipe"] != json.loads(json.dumps(new["recipe"])) or old["seeds"] != new["seeds"]:
        raise InvalidInput("The result file rests on another recipe; run the whole study.")
    fresh = {measure["name"]: measure for measure in measures}
    kept = [fresh.pop(measure["name"], measure) for measure in old["measures"]]
    return [*kept, *fresh.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="batches a seed and setting")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        choices=list(METHODS),
        metavar="RULE",
        help="run these rules again, and keep the other measures of --out",
    )
    parser.add_argument("--out", type=Path, default=Path("results/labels.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally, data = Tally(options.only), digits()
    fedsgd(tally, data, options.trials)
    fedavg(tally, data, options.trials)
    synthetic(tally, options.trials)
    result = {
        "schema": "leakatlas/result/1",
        "kind": "measure",
        "key": "labels",
        "code_version": 1,
        "recipe": {
            "metric": "IRec: multiset overlap of recovered and true labels",
            "trials_per_seed": options.trials,
            "digits": {
                "network": f"MLP 64-{WIDTH}-{WIDTH}-{CLASSES}", "activations": list(ACTIVATIONS),
                "epochs": STATES, "lr": LR, "batch": 32, "train": 700, "public": 400,
                "victims": "held out", "dummy": "400 inputs from N(0, 1)",
            },
            "fedavg": {"samples": 32, "epochs": 2, "batch": 16, "lr": LR},
            "synthetic": {"features": FEATURES, "spread": SPREAD, "public": 4_000},
            "interval": "95 % bootstrap of the mean over batches and model seeds",
        },
        "hardware": f"{os.cpu_count()} cores {platform.machine()}, one thread",
        "seeds": list(SEEDS),
        "measures": list(tally.measures()),
        "command": f"python benchmarks/labels.py --trials {options.trials}",
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    measures = result.pop("measures")
    assert isinstance(measures, list)
    if options.only:
        measures = merged(json.loads(options.out.read_text(encoding="utf-8")), result, measures)
    text = json.dumps(result, indent=1)[:-2]  # one measure a line, or a change cannot be read
    lines = ",\n".join("  " + json.dumps(measure) for measure in measures)
    options.out.write_text(f'{text},\n "measures": [\n{lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
