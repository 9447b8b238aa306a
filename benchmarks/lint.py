"""The detector study: hits and false alarms of every check of ``leakatlas lint``.

``python benchmarks/lint.py`` plays every implemented active row against several architectures,
from random weights and from honestly trained ones, and lints what the target receives; it lints
random initialisations and checkpoints of honest federated runs (even and skewed clients, small
batches) as well. Thresholds are set on one half of the benign models, whole runs at a time, and
reported on the other; no tampered model takes part in setting them.

Writes ``src/leakatlas/lint/thresholds.json``, ``results/lint/detectors.json`` and
``docs/lint.md``. With ``--data`` a Parquet file of CIFAR-10 is used instead of bundled photos.

``python benchmarks/lint.py --fresh SEED --data OTHER.parquet`` sets nothing. It judges, with the
thresholds that the package holds, models that no threshold and no rule has seen: seeds from
``SEED`` on, and pictures of another file. It writes ``results/lint/fresh.json`` and the section
"Fresh hold-out" of ``docs/lint.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lint_page
import torch
from torch import nn

from leakatlas import data, models
from leakatlas.attacks.api import ActiveAttack
from leakatlas.bench import harness
from leakatlas.catalogue import registry
from leakatlas.data import Box, ImageSet
from leakatlas.data.box import CIFAR10
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import (
    Client,
    FedAVG,
    Federation,
    FedSGD,
    ModelRef,
    Protocol,
    Scenario,
    load_into,
    model_state,
    stage,
    stream,
)
from leakatlas.lint import STATISTICS, dynamics, measure
from leakatlas.lint import thresholds as committed
from leakatlas.lint.findings import COMPARISONS
from leakatlas.lint.thresholds import NEAR, calibrated, threshold_of
from leakatlas.metrics.intervals import binomial
from leakatlas.threat import Knowledge, Vantage

ROOT = Path(__file__).resolve().parents[1]
SIZE, CLASSES = 32, 10
ROUNDS = (1, 2, 4, 8)
"""Checkpoints of an honest run are taken before these rounds."""


class ConvFC(nn.Sequential):
    """Two convolutions, a hidden linear layer, a head: what traps behind convolutions need."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(8 * (SIZE // 4) ** 2, 128),
                nn.ReLU(),
                nn.Linear(128, CLASSES),
            )


def _builtin(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    return lambda seed: models.build(name, classes=CLASSES, size=SIZE, seed=seed, **settings)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "fc": _builtin("fc", widths=(128, 64)),
    "lenet": _builtin("lenet"),
    "convnet": _builtin("convnet", width=8),
    "conv-fc": ConvFC,
    "vgg6": _builtin("vgg6", width=8),
    "resnet8": _builtin("resnet8", width=8),
    "vit": _builtin("vit", dim=32, patch=8),
}

# Learning what these rows send takes them far longer than a study of many models has. How well the
# autoencoder of scale_mia does is no matter to any check; a SEER that has hardly learned yet only
# shows that its weights look trained, as they are.
REDUCED: dict[str, dict[str, Any]] = {
    "scale_mia": {"epochs": 5},
    "seer": {"steps": 40, "batches": 2, "entries": 300, "batch_size": 8},
}
ONLY_ON = {"seer": ("resnet8",)}
"""Architectures of rows that need batch normalisation."""


def of(*checks: str) -> frozenset[str]:
    """The statistics of some checks."""
    return frozenset(s for s in STATISTICS if s.split("/")[0] in checks)


# Which statistics a client can compute with what it holds.
WEIGHTS = of("D2", "D3", "D4", "D5", "D6", "D7", "D15") - {"D7/saturation"} | {"D1/detour"}
BATCH = WEIGHTS | {"D7/saturation"} | of("D8", "D9", "D10", "D14")
REFERENCE = BATCH | of("D1", "D11", "D16", "D17")
ALL = REFERENCE | of("D12")
HOLDINGS = {
    "weights": WEIGHTS,
    "weights, batch": BATCH,
    "weights, batch, reference": REFERENCE,
    "weights, batch, reference, other clients": ALL,
}

PUBLISHED = of("D15", "D16", "D17")
DETECTORS = {
    "D1-D14, weights": WEIGHTS - PUBLISHED,
    "D1-D14, weights and batch": BATCH - PUBLISHED,
    "D1-D14, also the model before": REFERENCE - PUBLISHED,
    "2511.10502, weights (D15)": of("D15"),
    "2511.10502, loss and gradient (D16)": of("D16"),
    "2511.10502, both": of("D15", "D16"),
    "2506.20651, the model before (D17)": of("D17"),
    "all together": REFERENCE,
}
"""Our own checks by what they need, and the published ones as rebuilt from their abstracts."""


@dataclass
class Judged:
    """Scores of one model.

    Args:
        group: Models of one group (an architecture, a run) stay in one half.
        kind: ``initialisation``, ``checkpoint``, or the key of a row.
        architecture: A key of :data:`ARCHITECTURES`.
        scores: Largest value of every statistic.
    """

    group: str
    kind: str
    architecture: str
    scores: dict[str, float]


@dataclass
class Study:
    """Everything that was judged.

    Args:
        benign: Untampered models.
        tampered: What a row sent.
        refused: Rows that cannot tamper with an architecture, and why.
    """

    benign: list[Judged] = field(default_factory=list)
    tampered: list[Judged] = field(default_factory=list)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)


def judge(group: str, kind: str, architecture: str, model: nn.Module, **held: Any) -> Judged:
    found, _, _ = measure(model, **held)
    scores: dict[str, float] = {}
    for score in found:
        scores[score.statistic] = max(score.value, scores.get(score.statistic, 0.0))
    return Judged(group, kind, architecture, scores)


def box_of(seed: int) -> Box:
    """Plain pixels and normalised ones by turns."""
    return CIFAR10 if seed % 2 else Box.unit(3)


def batch_of(images: ImageSet, seed: int, count: int, *, skewed: bool) -> ImageSet:
    """A client's own examples, of any classes or of one."""
    generator = stream("lint batch", seed, count)
    order = torch.randperm(len(images), generator=generator)
    if skewed:
        order = order[images.labels[order] == images.labels[order[0]]]
    return images.subset(order[:count])


# -- benign models ---------------------------------------------------------------------------------


def initialisations(images: ImageSet, seeds: range) -> Iterator[Judged]:
    """Random weights, judged with a batch of 8, 16 or 32 examples; every third one skewed."""
    for name, build in ARCHITECTURES.items():
        for seed in seeds:
            batch = batch_of(images, seed, (8, 16, 32)[seed % 3], skewed=seed % 3 == 1)
            model = build(seed)
            yield judge(
                f"{name}/{seed}",
                "initialisation",
                name,
                model,
                batch=batch,
                box=box_of(seed),
                reference=build(seed),
                others=[model_state(model)],
            )


def honest_runs(images: ImageSet, seeds: range) -> Iterator[Judged]:
    """Checkpoints of honest runs, each judged by client 0 against the round before."""
    for name, build in ARCHITECTURES.items():
        for run, (protocol, count, skewed) in enumerate(run_settings()):
            for seed in seeds:
                yield from honest_run(
                    images, name, build(100 + seed), protocol, count, skewed, 10 * run + seed
                )


def run_settings() -> Iterator[tuple[Protocol, int, bool]]:
    """Protocol, examples a client, and whether each client has one class only."""
    yield FedAVG(epochs=1, batch_size=8, lr=0.05, shuffle=True), 32, False
    yield FedAVG(epochs=3, batch_size=4, lr=0.05, momentum=0.5), 8, True
    yield FedSGD(lr=0.1), 16, False


def honest_run(
    images: ImageSet,
    name: str,
    model: nn.Module,
    protocol: Protocol,
    count: int,
    skewed: bool,
    seed: int,
) -> Iterator[Judged]:
    box = box_of(seed)
    own = [batch_of(images, 50 * seed + c, count, skewed=skewed) for c in range(4)]
    clients = {c: Client(box.normalize(s.images), s.labels) for c, s in enumerate(own)}
    federation = Federation(model, clients, protocol, seed=seed)
    before = load_into(federation.model, model_state(federation.model))
    history = [dynamics(before, own[0], box=box)]
    for number in range(1, max(ROUNDS) + 1):
        federation.play_round(apply=True)
        if number in ROUNDS:
            yield judge(
                f"{name}/run {seed}",
                "checkpoint",
                name,
                federation.model,
                batch=own[0],
                box=box,
                reference=before,
                previous=before,
                others=[model_state(federation.model)],
                history=history,
            )
        before = load_into(federation.model, model_state(federation.model))
        history.append(dynamics(before, own[0], box=box))


# -- tampered models -------------------------------------------------------------------------------


def active_rows(chosen: str | None = None) -> dict[str, type[ActiveAttack]]:
    """Every implemented active row, or those named."""
    keys = registry.attack_keys() if chosen is None else chosen.split(",")
    found = {key: registry.load_attack(key) for key in keys}
    return {key: cls for key, cls in found.items() if issubclass(cls, ActiveAttack)}


def attacks(
    rows: Mapping[str, type[ActiveAttack]],
    images: ImageSet,
    public: ImageSet,
    seeds: range,
    study: Study,
    report: Callable[[str], None],
) -> None:
    """Every row at default strength on every architecture that it can tamper with."""
    for key, cls in rows.items():
        for name in ONLY_ON.get(key, tuple(ARCHITECTURES)):
            begun = time.perf_counter()
            for seed in seeds:
                try:
                    study.tampered.append(tampered(key, cls, name, seed, images, public))
                except (UnsupportedModel, InvalidInput) as problem:
                    study.refused.setdefault(key, {})[name] = str(problem)
                    break
            report(f"{key} on {name}: {time.perf_counter() - begun:.1f} s")


def tampered(
    key: str,
    cls: type[ActiveAttack],
    name: str,
    seed: int,
    images: ImageSet,
    public: ImageSet,
) -> Judged:
    """The last model that the row sends to client 0, judged with that client's batch and update.

    Odd seeds start from weights that were trained honestly for some rounds.
    """
    attack = replace(cls.tuned(), **REDUCED[key]) if key in REDUCED else cls()
    # MANDRAKE's single local step is a gradient, which survives float32; LOKI is made for deltas.
    fedavg = key == "loki"
    fedsgd = FedSGD(mode="train" if key == "seer" else "eval")
    clients = 4
    model = ARCHITECTURES[name](seed)
    box = box_of(seed // 2)
    earlier = list(trained(images, model, box, seed)) if seed % 2 else []
    model = earlier[-1] if earlier else model
    scenario = Scenario(
        model=ModelRef("object", name),
        letter="H" if attack.needs & Knowledge.SELECTION else "G",
        examples=16,
        clients=clients,
        protocol=FedAVG(batch_size=16, lr=0.01) if fedavg else fedsgd,
        vantage=Vantage.AGGREGATE if fedavg else Vantage.SERVER,
        seed=seed,
    )
    victims = batch_of(images, 1000 + seed, 16 * clients, skewed=False)
    played = stage(scenario, model=model, victims=victims, surrogate=public, box=box)
    _, records = harness.observe(played, attack, seed=seed)
    last = records[-1]
    client = played.federation.clients[0]
    return judge(
        f"{key}/{name}/{seed}", key, name, last.received[0],
        batch=(client.x, client.y), box=box, reference=model,
        previous=model if earlier else None, update=last.updates[0],
        history=[dynamics(one, (client.x, client.y)) for one in earlier],
        # Whom the server asks alone can still look into a log of what was announced.
        others=[last.states[c] for c in last.states if c != 0] or [model_state(model)],
    )  # fmt: skip


def trained(images: ImageSet, model: nn.Module, box: Box, seed: int) -> Iterator[nn.Module]:
    """What four honest rounds make of a model, round by round, its start included."""
    own = [batch_of(images, 7000 + 50 * seed + c, 32, skewed=False) for c in range(4)]
    clients = {c: Client(box.normalize(s.images), s.labels) for c, s in enumerate(own)}
    federation = Federation(model, clients, FedAVG(batch_size=8, lr=0.05), seed=seed)
    yield load_into(federation.model, model_state(federation.model))
    for _ in range(4):
        federation.play_round(apply=True)
        yield load_into(federation.model, model_state(federation.model))


# -- thresholds and figures ------------------------------------------------------------------------


def halves(benign: list[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Calibration and report: whole groups, by turns within each kind and architecture."""
    side: dict[str, int] = {}
    counts: dict[tuple[str, str], int] = {}
    for one in benign:
        if one.group not in side:
            place = (one.kind, one.architecture)
            side[one.group] = counts.get(place, 0) % 2
            counts[place] = counts.get(place, 0) + 1
    return (
        [b for b in benign if side[b.group] == 0],
        [b for b in benign if side[b.group] == 1],
    )


def calibrate(half: list[Judged]) -> dict[str, dict[str, float]]:
    """Largest benign value and threshold of every statistic."""
    found = {}
    for name in STATISTICS:
        if name in COMPARISONS:
            continue
        values = [b.scores[name] for b in half if name in b.scores]
        by_group: dict[str, float] = {}
        for b in half:
            if name in b.scores:
                by_group[b.group] = max(b.scores[name], by_group.get(b.group, 0.0))
        found[name] = {
            "threshold": calibrated(by_group),
            "largest": max(values, default=0.0),
            "median": float(torch.tensor(values or [0.0]).median()),
            "n": len(values),
            "groups": len(by_group),
        }
    return found


def alarms(one: Judged, thresholds: Mapping[str, float], held: frozenset[str]) -> set[str]:
    """Statistics above their thresholds."""
    return {n for n, v in one.scores.items() if n in held and v > thresholds[n]}


def level(
    one: Judged, calibration: Mapping[str, Mapping[str, float]], held: frozenset[str]
) -> float:
    """How far beyond the benign models, 0 at their largest value and 1 at certainty."""
    return max(
        (
            1 - (1 - v) / (1 - calibration[n]["largest"])
            for n, v in one.scores.items()
            if n in held and n in calibration and calibration[n]["threshold"] < 1
        ),
        default=-1.0,
    )


def area(benign: list[float], tampered: list[float]) -> float:
    """Area under the ROC curve: the chance that a tampered model scores higher, ties half."""
    low, high = torch.tensor(benign).double(), torch.tensor(tampered).double()
    wins = (high[:, None] > low).double() + 0.5 * (high[:, None] == low).double()
    return float(wins.mean())


def share(name: str, hits: int, n: int, note: str) -> dict[str, Any]:
    low, high = binomial(hits, n)
    return {
        "name": name, "value": hits / n, "unit": "", "interval": [low, high], "n": n, "note": note,
    }  # fmt: skip


def figures(
    reported: list[Judged],
    tampered: list[Judged],
    calibration: Mapping[str, Mapping[str, float]],
    benign: str = "held-out",
) -> list[dict[str, Any]]:
    """False alarms and hits of the whole detector, of each check and of each statistic.

    Args:
        reported: Benign models that set no threshold.
        tampered: Models that rows sent.
        calibration: Threshold and largest benign value of every statistic.
        benign: What the benign models are called in the notes.
    """
    thresholds = {n: row["threshold"] for n, row in calibration.items()}
    thresholds |= dict.fromkeys(COMPARISONS, threshold_of(0.0))
    keys = list(dict.fromkeys(one.kind for one in tampered))
    measures = []
    for holding, held in HOLDINGS.items():
        wrong = [b for b in reported if alarms(b, thresholds, held)]
        names = sorted({n for b in wrong for n in alarms(b, thresholds, held)})
        measures.append(
            share(
                f"false_alarm/{holding}",
                len(wrong),
                len(reported),
                f"{benign} benign models" + (f"; by {', '.join(names)}" if names else ""),
            )
        )
        for kind in ("initialisation", "checkpoint"):
            part = [b for b in reported if b.kind == kind]
            measures.append(
                share(
                    f"false_alarm/{holding}/{kind}",
                    sum(b.kind == kind for b in wrong),
                    len(part),
                    f"{benign} {kind}s",
                )
            )
        for key in keys:
            part = [t for t in tampered if t.kind == key]
            hit = sum(bool(alarms(t, thresholds, held)) for t in part)
            where = ", ".join(dict.fromkeys(t.architecture for t in part))
            measures.append(share(f"hit/{key}/{holding}", hit, len(part), f"on {where}"))
        for at in (0.0, 0.25, 0.5, 0.75, 0.9):
            wrong_at = sum(level(b, calibration, held) > at for b in reported)
            hit_at = sum(level(t, calibration, held) > at for t in tampered)
            measures.append(
                share(f"roc/{holding}/level {at}/false_alarm", wrong_at, len(reported), ROC)
            )
            measures.append(share(f"roc/{holding}/level {at}/hit", hit_at, len(tampered), ROC))
    checks = list(dict.fromkeys(name.split("/")[0] for name in STATISTICS))
    for check in checks:
        own = frozenset(n for n in STATISTICS if n.split("/")[0] == check)
        judged = [b for b in reported if own & b.scores.keys()]
        if not judged:
            continue
        measures.append(
            share(
                f"false_alarm/{check}",
                sum(bool(alarms(b, thresholds, own)) for b in judged),
                len(judged),
                f"{benign} benign models on which the check runs",
            )
        )
        for key in keys:
            part = [t for t in tampered if t.kind == key]
            hit = sum(bool(alarms(t, thresholds, own)) for t in part)
            measures.append(share(f"hit/{key}/{check}", hit, len(part), "all models of the row"))
    measures += beside(reported, tampered, thresholds)
    for name in calibration:
        low = [b.scores[name] for b in reported if name in b.scores]
        for key in keys:
            high = [t.scores[name] for t in tampered if t.kind == key and name in t.scores]
            if low and high:
                measures.append(
                    {
                        "name": f"auc/{name}/{key}",
                        "value": area(low, high),
                        "unit": "",
                        "interval": None,
                        "n": len(low) + len(high),
                        "note": f"area under the ROC curve, {benign} benign against the row; "
                        "no interval: models of one run are not independent",
                    }
                )
    return measures


def beside(
    reported: list[Judged], tampered: list[Judged], thresholds: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """False alarms and hits of our checks and the published ones, where each can be run."""
    keys = dict.fromkeys(one.kind for one in tampered)
    for name, own in DETECTORS.items():
        for label, models_ in (
            ("false_alarm", reported),
            *((f"hit/{key}", [t for t in tampered if t.kind == key]) for key in keys),
        ):
            judged = [one for one in models_ if own & one.scores.keys()]
            if judged:
                raised = sum(bool(alarms(one, thresholds, own)) for one in judged)
                note = f"of the {len(models_)} models that it can judge"
                yield share(f"beside/{name}/{label}", raised, len(judged), note)


ROC = "whole detector; level 0.5 is the threshold in use, comparisons left out"


# -- fresh hold-out --------------------------------------------------------------------------------


SEEN = 10_000
"""Seeds below this one, those derived from them included, may have been seen when rules were set.

``honest_runs`` derives ``100 + 10 run + seed`` and ``50 seed + client``, the plays ``1000 + seed``
and ``7000 + 50 seed + client``.
"""


def write_fresh(root: Path, study: Study, recipe: dict[str, Any], first: int, command: str) -> None:
    """``results/lint/fresh.json``."""
    calibration = json.loads(committed.FILE.read_text(encoding="utf-8"))["statistics"]
    measures = figures(study.benign, study.tampered, calibration, "fresh")
    thresholds = committed.read().thresholds
    groups: dict[str, list[Judged]] = {}
    for one in study.benign:
        groups.setdefault(one.group, []).append(one)
    for holding, held in HOLDINGS.items():
        wrong = {g for g, part in groups.items() if any(alarms(b, thresholds, held) for b in part)}
        note = "independent initialisations and runs with an alarm on at least one model"
        measures.append(share(f"false_alarm/{holding}/independent", len(wrong), len(groups), note))
    raised = [
        {"model": b.group, "kind": b.kind, "by": sorted(alarms(b, thresholds, ALL))}
        for b in study.benign
        if alarms(b, thresholds, ALL)
    ]
    last = first + max(recipe[k] for k in ("init_seeds", "run_seeds", "attack_seeds"))
    result = {
        "schema": "leakatlas/result/1",
        "kind": "measure",
        "key": "lint",
        "code_version": 1,
        "recipe": {
            **recipe,
            "fresh": first,
            "thresholds": lint_page.fingerprint(committed.FILE),
            "alarms": raised,
        },
        "hardware": hardware(),
        "seeds": list(range(first, last)),
        "measures": measures,
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    write(root / "results/lint/fresh.json", result)


def write_calibration(root: Path, study: Study, recipe: dict[str, Any], command: str) -> None:
    """``thresholds.json`` from one half of the benign models, ``detectors.json`` on the other."""
    half, reported = halves(study.benign)
    kinds = {k: sum(b.kind == k for b in study.benign) for k in ("initialisation", "checkpoint")}
    calibration: dict[str, Any] = {
        "schema": "leakatlas/lint-thresholds/1",
        "rule": "The threshold halves what is left between the largest value on the calibration "
        "half of the benign models and certainty: t = 1 - (1 - largest) / 2 (quantile 1, plus "
        "that margin). A statistic is context only (threshold 1) if a benign model exceeds "
        f"{1 - NEAR:g}, or if one run exceeds the threshold that all others set. Tampered models "
        "play no part.",
        "benign": f"{len(study.benign)} benign models ({kinds['initialisation']} random "
        f"initialisations, {kinds['checkpoint']} checkpoints of honest runs of up to "
        f"{max(ROUNDS)} rounds) of {', '.join(ARCHITECTURES)} on {recipe['images']}; "
        f"{len(half)} to calibrate, {len(reported)} held out.",
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "statistics": calibrate(half),
    }
    result = {
        "schema": "leakatlas/result/1",
        "kind": "measure",
        "key": "lint",
        "code_version": 1,
        "recipe": recipe,
        "hardware": hardware(),
        "seeds": list(range(max(recipe["init_seeds"], recipe["attack_seeds"]))),
        "measures": figures(reported, study.tampered, calibration["statistics"]),
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
    }
    write(root / lint_page.THRESHOLDS, calibration)
    write(root / "results/lint/detectors.json", result)


def hardware() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}){gpu}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Parquet file of CIFAR-10 (train)")
    parser.add_argument("--init-seeds", type=int, default=12)
    parser.add_argument("--run-seeds", type=int, default=2)
    parser.add_argument("--attack-seeds", type=int, default=4)
    parser.add_argument("--rows", help="keys of active rows, with commas; all if left out")
    parser.add_argument(
        "--fresh", type=int, metavar="SEED", help="judge new models from this seed on; set nothing"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="where results are written")
    options = parser.parse_args()
    if options.fresh is not None and options.fresh < SEEN:
        parser.error(f"--fresh {options.fresh}: the calibration used seeds below {SEEN}")
    torch.set_num_threads(1)
    begun = time.perf_counter()

    def report(text: str) -> None:
        sys.stderr.write(f"{time.perf_counter() - begun:7.1f} s  {text}\n")

    if options.data is not None:
        private = data.parquet(options.data, limit=4_000, name=f"cifar10-{options.data.stem}")
        images, public = private.subset(range(3_000)), private.subset(range(3_000, 4_000))
    else:
        images = data.patches(SIZE, 1_024)
        public = data.patches(SIZE, 512, part="surrogate")
    study = Study()
    first = options.fresh or 0
    study.benign += initialisations(images, range(first, first + options.init_seeds))
    report(f"{len(study.benign)} initialisations")
    study.benign += honest_runs(images, range(first, first + options.run_seeds))
    report(f"{len(study.benign)} benign models")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LEAKATLAS_CACHE"] = cache  # what rows learn here is of no use elsewhere
        seeds = range(first, first + options.attack_seeds)
        attacks(active_rows(options.rows), images, public, seeds, study, report)
    command = "python " + shlex.join(["benchmarks/lint.py", *sys.argv[1:]])
    recipe = {
        "architectures": list(ARCHITECTURES),
        "images": images.name,
        "init_seeds": options.init_seeds,
        "run_seeds": options.run_seeds,
        "attack_seeds": options.attack_seeds,
        "checkpoints": list(ROUNDS),
        "examples": {"initialisations": [8, 16, 32], "runs": [32, 8, 16], "attacks": 16},
        "refused": study.refused,
        "reduced": REDUCED,
    }
    if options.fresh is None:
        write_calibration(options.root, study, recipe, command)
    else:
        write_fresh(options.root, study, recipe, first, command)
    write_page(options.root)
    report("done")


def write_page(root: Path) -> None:
    (root / "docs/lint.md").write_text(lint_page.page(root), encoding="utf-8")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
