"""How every vulnerability measure relates to what attacks reach.

``python benchmarks/measures.py --data cifar10/test.parquet --tuning cifar10/train.parquet`` first
settles the attacks' total-variation weight on training images that no shipped network has seen.
Then it runs every cell (network, trained or not, batch size, protocol, defense) on test images that
no shipped network has seen either: it takes all measures of :mod:`leakatlas.vulnerability` before
the attacks, runs the attacks and scores them. It writes ``results/measures.json`` and
``docs/measures.md``; ``--tables`` rebuilds the page from the results. With ``--journal`` every
finished run is kept, and the same command goes on after a stop.

Rank correlations (Spearman) come in four scopes:

- *pooled*: over all trials. Mostly differences between networks, batch sizes and defenses.
- *fedavg*: the same over the trials in which clients take several local steps.
- *within*: ranks taken within each cell, then correlated together. Whether the measure tells one
  batch from another under the same set-up.
- *image*: ranks within each batch, for measures that have a value for every example.

Each is oriented: positive means that the measure is right about the direction it claims.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.progress import track
from scipy.stats import rankdata
from torch import Tensor

from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import CIFAR10, ImageSet, parquet
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import GradientPruning
from leakatlas.fl import Defense, FedAVG, FedSGD, ModelRef, Protocol, Scenario, stage, stream
from leakatlas.metrics import bootstrap, score
from leakatlas.threat import Grant
from leakatlas.vulnerability import Case, assess

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "measures.json"
PAGE = ROOT / "docs" / "measures.md"
COMMAND = "python benchmarks/measures.py --data cifar10/test.parquet --tuning cifar10/train.parquet"

SEED = 0
STEPS = 200
PUBLIC = 64
FEWEST = 50
"""Correlations over fewer samples are noise and are not reported."""

NETWORKS: dict[str, tuple[ModelRef, str | None]] = {
    "fc": (ModelRef("builtin", "fc", {"classes": 10, "widths": [64]}), None),
    "lenet": (ModelRef("builtin", "lenet", {"classes": 10, "act": "sigmoid"}), None),
    "convnet-8": (ModelRef("builtin", "convnet", {"classes": 10, "width": 8}), None),
    "convnet-8 softplus": (
        ModelRef("builtin", "convnet", {"classes": 10, "width": 8, "act": "softplus"}),
        None,
    ),
    "convnet trained": (ModelRef("builtin", "convnet", {}), "convnet-cifar10"),
    "convnet-bn trained": (ModelRef("builtin", "convnet-bn", {}), "convnet-bn-cifar10"),
}
"""Untrained networks draw new weights for every image; batch normalisation is in eval mode."""

DEFENSES: dict[str, tuple[Defense, ...]] = {
    "none": (),
    "top-k 10 %": (GradientPruning.top_k(0.9, error_feedback=False),),
    "clip 1, noise 0.001": (
        ClientDP(unit="update", clip_norm=1.0, noise_multiplier=1e-3, clipping="flat"),
    ),
}

PROTOCOLS: dict[str, Protocol] = {
    "FedSGD": FedSGD(),
    "FedAVG 1x4": FedAVG(epochs=1, batch_size=1, lr=0.01, mode="eval"),
    "FedAVG 2x1": FedAVG(epochs=2, batch_size=4, lr=0.01, mode="eval"),
}
"""Epochs x local steps an epoch, for clients of four examples."""

ATTACKS: dict[str, InvertingGradients] = {
    "l2": replace(InvertingGradients.tuned(steps=STEPS), tv_per_example=False),
    "cosine": InvertingGradients(steps=STEPS),
}
"""Labels are granted: the measures are about images. The weight of the prior is tuned."""

TV_WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Candidates for every attack's total-variation weight, around the published 0.1."""
HELD_OUT = 5_000
"""Last images of CIFAR-10's training file, on which no shipped network was trained."""
TUNING_IMAGES = 2
"""Images for each network, other ones for every network."""
TUNING_SEED = 1_000
"""Seeds of the tuning's networks and starts; the study's own are below it."""


@dataclass(frozen=True)
class Cell:
    """One set-up."""

    network: str
    batch: int
    defense: str
    protocol: str = "FedSGD"

    @property
    def name(self) -> str:
        """For tables."""
        shown = "" if self.protocol == "FedSGD" else f", {self.protocol}"
        return f"{self.network}, B={self.batch}{shown}, {self.defense}"


def cells() -> dict[Cell, int]:
    """Every cell with its number of trials."""
    fresh = {name: weights is None for name, (_, weights) in NETWORKS.items()}
    singles = {Cell(n, 1, d): 5 if fresh[n] else 4 for n in NETWORKS for d in DEFENSES}
    batches = {Cell(n, 4, "none"): 3 if fresh[n] else 2 for n in NETWORKS}
    # The same batches under several local steps: what differs is the protocol alone.
    local = {
        Cell(n, 4, "none", p): 5 if fresh[n] else 3
        for n in NETWORKS
        for p in PROTOCOLS
        if p != "FedSGD"
    }
    return singles | batches | local


def scenario_of(cell: Cell, seed: int, data: str) -> Scenario:
    """A cell with the weights and the seed of one trial."""
    reference, weights = NETWORKS[cell.network]
    if weights is None:
        reference = replace(reference, kwargs={**reference.kwargs, "seed": seed})
    return Scenario(
        model=reference,
        weights=weights,
        data=data,
        examples=cell.batch,
        protocol=PROTOCOLS[cell.protocol],
        defenses=DEFENSES[cell.defense],
        letter="C",
        grants=frozenset({Grant.LABELS}),
        seed=SEED + seed,
    )


def watch() -> Watch:
    """No limit, and one named execution: the study repeats bit for bit on one machine."""
    return Watch(conduct=Conduct(execution="eager"))


# -- tuning ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One attack with one weight on one training image."""

    attack: str
    weight: float
    network: str
    place: int

    @property
    def key(self) -> str:
        """For the journal."""
        return f"tuning {self.attack}, {self.weight}, {self.network}, {self.place}"


def attempts() -> list[Attempt]:
    """Every weight of every attack on the same images: TUNING_IMAGES of its own for a network."""
    return [
        Attempt(attack, weight, network, TUNING_IMAGES * place + image)
        for place, network in enumerate(NETWORKS)
        for image in range(TUNING_IMAGES)
        for attack in ATTACKS
        for weight in TV_WEIGHTS
    ]


def held_out(path: Path, count: int) -> ImageSet:
    """The first ``count`` of the last :data:`HELD_OUT` images of a Parquet file."""
    table = pq.read_table(path)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        pq.write_table(table.slice(len(table) - HELD_OUT, count), part)
        return parquet(part)


def run_attempt(job: tuple[Attempt, ImageSet]) -> dict[str, Any]:
    """The PSNR of one attack on one undefended image of the tuning set."""
    attempt, images = job
    torch.set_num_threads(1)
    seed = TUNING_SEED + attempt.place
    scenario = scenario_of(Cell(attempt.network, 1, "none"), seed, "cifar10/train")
    victims = images.subset([attempt.place])
    live = stage(scenario, victims=victims, box=CIFAR10)
    attack = replace(ATTACKS[attempt.attack], tv_weight=attempt.weight)
    begun = time.perf_counter()
    trial = harness.run_trial(live, attack, seed=seed, watch=watch())
    public = images.subset([i for i in range(len(images)) if i != attempt.place])
    scores = score(trial.images, trial.truth.images, public=public.images, resamples=1)
    return {**vars(attempt), "psnr": scores.psnr.mean, "seconds": time.perf_counter() - begun}


def tuned_weights(tuning: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By attack, the weight of the highest mean PSNR over all networks' tuning images."""
    return {
        attack: max(TV_WEIGHTS, key=lambda w: sum(reached_by(tuning, attack, w)))
        for attack in ATTACKS
    }


def reached_by(tuning: Sequence[Mapping[str, Any]], attack: str, weight: float) -> list[float]:
    """The PSNR of every attempt of one attack with one weight."""
    return [t["psnr"] for t in tuning if (t["attack"], t["weight"]) == (attack, weight)]


# -- trials ----------------------------------------------------------------------------------------


def run_trial(job: tuple[Cell, int, str, Mapping[str, float]]) -> dict[str, Any]:
    """Measure, attack and score one batch."""
    cell, index, data, weights = job
    torch.set_num_threads(1)
    images = parquet(Path(data), limit=400)
    begin = 4 * index + (200 if cell.batch > 1 else 0)
    victims = images.subset(range(begin, begin + cell.batch))
    public = images.subset(range(300, 300 + PUBLIC))
    scenario = scenario_of(cell, index, "cifar10/test")
    begun = time.perf_counter()
    measured = None
    reached: dict[str, Any] = {}
    for name, attack in ATTACKS.items():
        live = stage(scenario, victims=victims, surrogate=public, box=CIFAR10)
        tuned = replace(attack, tv_weight=weights[name])
        trial = harness.run_trial(live, tuned, seed=index, watch=watch())
        scores = score(
            trial.images, trial.truth.images, public=public.images, resamples=1,
            labels=trial.truth.labels,
        )  # fmt: skip
        reached[name] = {
            "psnr": scores.psnr.mean,
            "gain": scores.gain,
            "images": [image.psnr for image in scores.images],
        }
        if measured is None:
            case = Case.of_stage(live, record=trial.records[-1])
            measured = [
                m.to_json() for m in assess(case, tier="spectral", limit=64, steps=20, probes=2)
            ]
    return {
        "cell": vars(cell),
        "index": index,
        "measures": measured,
        "attacks": reached,
        "seconds": time.perf_counter() - begun,
    }


# -- statistics ------------------------------------------------------------------------------------


def spearman_rows(ranks: Tensor) -> Tensor:
    """Correlation of pairs ``(R, N, 2)``, after ranking each column; 0 where one is constant."""
    a, b = (torch.from_numpy(rankdata(ranks[..., i].numpy(), axis=-1)) for i in (0, 1))
    return pearson_rows(a, b)


def pearson_rows(a: Tensor, b: Tensor) -> Tensor:
    """Correlation over the last dimension; 0 where one side is constant."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(size > 0, (a * b).sum(-1) / size.clamp(min=1e-300), torch.zeros_like(size))


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its bootstrap interval."""

    rho: float
    low: float
    high: float
    n: int


def correlate(
    x: Sequence[float], y: Sequence[float], *, ranked: bool, seed: object, resamples: int = 2_000
) -> Correlation | None:
    """Over pairs; None if there are too few, or one side is constant.

    Args:
        x: The measure.
        y: The quality reached.
        ranked: Whether both are ranks within their groups already.
        seed: Of the resampling.
        resamples: How many.
    """
    pairs = torch.tensor([x, y], dtype=torch.float64).T
    if len(pairs) < FEWEST or bool((pairs == pairs[0]).all(dim=0).any()):
        return None

    def rho(rows: Tensor) -> Tensor:
        return pearson_rows(rows[..., 0], rows[..., 1]) if ranked else spearman_rows(rows)

    # Resampling indices: a pair stays together.
    where = torch.arange(len(pairs), dtype=torch.float64)
    found = bootstrap(
        where, generator=stream("measures", seed), resamples=resamples,
        statistic=lambda rows: rho(pairs[rows.long()]),
    )  # fmt: skip
    value = float(rho(pairs[None])[0])
    return Correlation(value, min(found.low, value), max(found.high, value), len(pairs))


def centred_ranks(values: Sequence[float]) -> list[float]:
    """Ranks within a group, scaled to [-1, 1]; all 0 where the group is constant."""
    ranks = rankdata(values)
    half = (len(values) - 1) / 2
    return [float((r - 1 - half) / half) for r in ranks] if half else [0.0] * len(values)


def summarise(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every figure of the study, as the measures of a result."""
    found: list[dict[str, Any]] = []
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(Cell(**trial["cell"]).name, []).append(trial)
    for attack in ATTACKS:
        for name, group in groups.items():
            for quantity in ("psnr", "gain"):
                values = torch.tensor(
                    [t["attacks"][attack][quantity] for t in group], dtype=torch.float64
                )
                interval = bootstrap(values, generator=stream("measures", attack, name))
                found.append(
                    entry(f"{quantity}/{attack}/{name}", float(values.mean()), interval,
                          len(values), "mean over batches", unit="dB")
                )  # fmt: skip
    keys = {m["name"]: m for trial in trials for m in trial["measures"]}
    for attack in ATTACKS:
        for key, measure in keys.items():
            sign = -1.0 if measure["direction"] == "lower" else 1.0
            note = f"{measure['tier']}; {'lower' if sign < 0 else 'higher'} claimed more vulnerable"
            rows = [
                (Cell(**t["cell"]).name, sign * value, t["attacks"][attack]["psnr"])
                for t in trials
                if (value := value_of(t, key)) is not None
            ]
            several = [row for row in rows if "FedAVG" in row[0]]
            pooled, local = (
                correlate(
                    [r[1] for r in some], [r[2] for r in some], ranked=False, seed=(attack, key)
                )
                for some in (rows, several)
            )
            x, y = within(rows)
            inside = correlate(x, y, ranked=True, seed=(attack, key, "within"))
            images = [
                (f"{i}", sign * measured, quality)
                for i, t in enumerate(trials)
                if len(t["attacks"][attack]["images"]) > 1
                for measured, quality in zip(
                    examples_of(t, key), t["attacks"][attack]["images"], strict=False
                )
            ]
            x, y = within(images)
            each = correlate(x, y, ranked=True, seed=(attack, key, "image"))
            for scope, result in (
                ("pooled", pooled), ("fedavg", local), ("within", inside), ("image", each)
            ):  # fmt: skip
                if result is not None:
                    found.append(
                        entry(f"spearman {scope}/{attack}/{key}", result.rho,
                              (result.low, result.high), result.n, note)
                    )  # fmt: skip
    return found


def within(rows: Sequence[tuple[str, float, float]]) -> tuple[list[float], list[float]]:
    """Both sides as ranks within their group; groups in which the measure is constant are left out.

    There the measure says nothing about single batches, right or wrong.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in rows:
        groups.setdefault(name, []).append((x, y))
    left: list[float] = []
    right: list[float] = []
    for pairs in groups.values():
        measured, reached = [x for x, _ in pairs], [y for _, y in pairs]
        if len(set(measured)) > 1:
            left += centred_ranks(measured)
            right += centred_ranks(reached)
    return left, right


def value_of(trial: Mapping[str, Any], key: str) -> float | None:
    """A measure's value in one trial, to six digits: what differs less is rounding, not rank."""
    for measure in trial["measures"]:
        if measure["name"] == key:
            value = measure["value"]
            return None if value is None else float(f"{value:.6g}")
    return None


def examples_of(trial: Mapping[str, Any], key: str) -> list[float]:
    """A measure's values for single examples, in order; empty if it has none."""
    values: Mapping[str, float] = next(
        (m["values"] for m in trial["measures"] if m["name"] == key), {}
    )
    return [float(f"{v:.6g}") for name, v in values.items() if name.startswith("example ")]


def entry(
    name: str,
    value: float,
    interval: Sequence[float],
    n: int,
    note: str,
    *,
    unit: str = "",
) -> dict[str, Any]:
    """One measured number of a result."""
    low, high = min(interval[0], value), max(interval[1], value)
    return {"name": name, "value": value, "unit": unit, "interval": [low, high], "n": n,
            "note": note}  # fmt: skip


# -- files -----------------------------------------------------------------------------------------


def tuning_entries(tuning: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What every weight reached on the tuning images."""
    found = []
    for attack in ATTACKS:
        for weight in TV_WEIGHTS:
            values = torch.tensor(reached_by(tuning, attack, weight), dtype=torch.float64)
            interval = bootstrap(values, generator=stream("measures", attack, weight))
            found.append(
                entry(f"tuning/{attack}/{weight}", float(values.mean()), interval, len(values),
                      "mean PSNR over held-out training images", unit="dB")
            )  # fmt: skip
    return found


def result(
    trials: Sequence[Mapping[str, Any]], tuning: Sequence[Mapping[str, Any]], wall: str
) -> dict[str, Any]:
    """The content of ``results/measures.json``; ``wall`` says how long the command took."""
    weights = tuned_weights(tuning)
    return {
        "schema": "leakatlas/result/1",
        "kind": "measure",
        "key": "measures",
        "code_version": 2,
        "recipe": {
            "networks": {
                name: {"model": vars(reference), "weights": weights}
                for name, (reference, weights) in NETWORKS.items()
            },
            "defenses": {
                name: [{"key": d.key, **d.to_json()} for d in defenses]
                for name, defenses in DEFENSES.items()
            },
            "protocols": {name: p.to_json() for name, p in PROTOCOLS.items()},
            "attacks": {
                name: {"key": a.key, **replace(a, tv_weight=weights[name]).to_json()}
                for name, a in ATTACKS.items()
            },
            "tuning": {
                "parameter": "tv_weight",
                "candidates": TV_WEIGHTS,
                "chosen": weights,
                "by": "highest mean PSNR, one weight an attack for all networks",
                "data": f"{TUNING_IMAGES} images a network, {TUNING_IMAGES * len(NETWORKS)} in "
                f"all, from the last {HELD_OUT:,} of CIFAR-10's training file (held out from the "
                "shipped networks), B=1, FedSGD, no defense",
            },
            "cells": {cell.name: count for cell, count in cells().items()},
            "protocol": "FedSGD and FedAVG, eval mode, labels granted",
            "data": "CIFAR-10 test images; measures at Lanczos steps 20, probes 2",
            "trials": len(trials),
            "minutes on one thread": round(sum(t["seconds"] for t in (*trials, *tuning)) / 60, 1),
            "wall": wall,
        },
        "hardware": f"{os.cpu_count()} CPU cores {platform.machine()}, no GPU, one thread a trial",
        "seeds": sorted({SEED + int(t["index"]) for t in trials}),
        "measures": [*summarise(trials), *tuning_entries(tuning)],
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def page(content: Mapping[str, Any]) -> str:
    """``docs/measures.md`` from the results alone."""
    figures = {m["name"]: m for m in content["measures"]}
    attacks = list(content["recipe"]["attacks"])
    keys = list(dict.fromkeys(
        name.split("/", 2)[2] for name in figures if name.startswith("spearman ")
    ))  # fmt: skip
    lines = [
        f"<!-- generated by `{content['command']}` from results/measures.json; do not edit -->",
        "",
        "# Do the measures predict what attacks reach?",
        "",
        f"Spearman rank correlation with the PSNR reached, {content['recipe']['trials']} trials, "
        f"{content['recipe']['protocol']}, {content['hardware']}, {content['date']}. Positive: the "
        "measure is right about the direction it claims. Brackets: 95 % bootstrap interval; n: "
        "samples. A measure that is constant in a scope, or has fewer than "
        f"{FEWEST} samples there, has no entry.",
        "",
        _tuning_sentence(content),
        "",
        f"The whole study took {content['recipe']['wall']}. {_failure_sentence(content)}",
    ]
    scopes = (
        ("pooled", "Pooled over all set-ups"),
        ("fedavg", "Pooled over the set-ups with several local steps"),
        ("within", "Within one set-up: which batch fares worse"),
        ("image", "Within one batch: which image fares worse"),
    )
    for scope, title in scopes:
        shown = [k for k in keys if f"spearman {scope}/{attacks[0]}/{k}" in figures]
        if not shown:
            continue
        shown.sort(key=lambda k: -figures[f"spearman {scope}/{attacks[0]}/{k}"]["value"])
        lines += ["", f"## {title}", ""]
        lines.append(
            "| Measure | Tier | " + " | ".join(f"{a} matching" for a in attacks) + " | n |"
        )
        lines.append("|---|---|" + "---|" * len(attacks) + "---|")
        for key in shown:
            entries = [figures[f"spearman {scope}/{a}/{key}"] for a in attacks]
            tier = entries[0]["note"].split(";")[0]
            values = " | ".join(_figure(e) for e in entries)
            lines.append(f"| `{key}` | {tier} | {values} | {entries[0]['n']} |")
    lines += ["", "## What the attacks reached", ""]
    reached = " | ".join(f"PSNR, {attack} (dB) | gain over null (dB)" for attack in attacks)
    lines.append(f"| Set-up | {reached} | n |")
    lines.append("|---|" + "---|---|" * len(attacks) + "---|")
    for name in content["recipe"]["cells"]:
        columns = [
            _figure(figures[f"{quantity}/{attack}/{name}"], 1)
            for attack in attacks
            for quantity in ("psnr", "gain")
        ]
        count = figures[f"psnr/{attacks[0]}/{name}"]["n"]
        lines.append(f"| {name} | {' | '.join(columns)} | {count} |")
    return "\n".join(lines) + "\n"


def _tuning_sentence(content: Mapping[str, Any]) -> str:
    """How the attacks' weight was chosen, and what the candidates reached there."""
    tuning = content["recipe"]["tuning"]
    figures = {m["name"]: m for m in content["measures"]}
    parts = []
    for attack, chosen in tuning["chosen"].items():
        reached = ", ".join(
            f"{w:g}: {figures[f'tuning/{attack}/{w}']['value']:.1f}" for w in tuning["candidates"]
        )
        parts.append(f"{chosen:g} for {attack} matching (dB by candidate: {reached})")
    return (
        f"The attacks' total-variation weight was chosen by {tuning['by']}, on {tuning['data']}; "
        f"no image of the study was used. It is {'; '.join(parts)}."
    )


def _failure_sentence(content: Mapping[str, Any]) -> str:
    """In how many set-ups ranks are those of failures."""
    figures = {m["name"]: m["value"] for m in content["measures"]}
    names = list(content["recipe"]["cells"])
    counts = [
        f"{sum(figures[f'gain/{attack}/{name}'] < 1 for name in names)} by {attack} matching"
        for attack in content["recipe"]["attacks"]
    ]
    return (
        f"Of {len(names)} set-ups, the mean is less than 1 dB above the best null baseline in "
        f"{' and in '.join(counts)}: there the attack failed, and ranks among failures tell little "
        "of leakage. The last table has every gain."
    )


def _figure(entry: Mapping[str, Any], digits: int = 2) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="Parquet file of CIFAR-10's test images")
    parser.add_argument("--tuning", type=Path, help="Parquet file of CIFAR-10's training images")
    parser.add_argument("--journal", type=Path, help="finished runs, to go on after a stop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="rebuild the page only")
    options = parser.parse_args()
    if not options.tables:
        if options.data is None or options.tuning is None:
            parser.error("--data and --tuning are needed to run the study")
        journal = Journal.of(options.journal)
        kept, begun = len(journal.done), time.perf_counter()
        with ProcessPoolExecutor(max_workers=options.workers) as pool:
            tuning = tune(options.tuning, journal, pool)
            trials = run_all(options.data, tuned_weights(tuning), journal, pool)
        RESULT.parent.mkdir(exist_ok=True)
        wall = f"{(time.perf_counter() - begun) / 60:.1f} minutes, {options.workers} workers"
        wall += f"; {kept} runs were kept from earlier" if kept else ""
        text = json.dumps(result(trials, tuning, wall), indent=1, allow_nan=False)
        RESULT.write_text(text + "\n", encoding="utf-8")
    stored = json.loads(RESULT.read_text(encoding="utf-8"))
    if "tuning" not in stored["recipe"]:
        parser.error(f"{RESULT.name} is of a study before its weights were tuned; run it again")
    PAGE.write_text(page(stored), encoding="utf-8")


@dataclass
class Journal:
    """Finished runs by key, one JSON line each; kept in memory alone without a file."""

    file: Path | None
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: Path | None) -> Journal:
        """What a file holds; a last line that a kill cut short is dropped and its run repeated."""
        journal = cls(file)
        if file is not None and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    kept = json.loads(line)
                except json.JSONDecodeError:
                    if number < len(lines):
                        raise
                    file.write_text("".join(f"{one}\n" for one in lines[:-1]), encoding="utf-8")
                else:
                    journal.done[kept["key"]] = kept["trial"]
        return journal

    def finish(
        self,
        jobs: Mapping[str, Any],
        run: Callable[[Any], dict[str, Any]],
        pool: ProcessPoolExecutor,
        title: str,
    ) -> list[dict[str, Any]]:
        """The result of every job, in order; those of the journal are not run again."""
        missing = {key: job for key, job in jobs.items() if key not in self.done}
        running = zip(missing, pool.map(run, missing.values()), strict=True)
        for key, found in track(running, title, total=len(missing)):
            self.done[key] = found
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "trial": found}) + "\n")
        return [self.done[key] for key in jobs]


def settings_mark() -> str:
    """A short hash of what trials rest on, so that a journal of other settings is not read."""
    content = {
        "attacks": {name: a.to_json() for name, a in ATTACKS.items()},
        "networks": {n: [vars(m), w] for n, (m, w) in NETWORKS.items()},
        "protocols": {n: p.to_json() for n, p in PROTOCOLS.items()},
        "defenses": {n: [d.to_json() for d in ds] for n, ds in DEFENSES.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def tune(path: Path, journal: Journal, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """Every attempt on the tuning images."""
    images = held_out(path, TUNING_IMAGES * len(NETWORKS))
    mark = settings_mark()
    jobs = {f"{attempt.key} [{mark}]": (attempt, images) for attempt in attempts()}
    return journal.finish(jobs, run_attempt, pool, "Tuning")


def run_all(
    data: Path, weights: Mapping[str, float], journal: Journal, pool: ProcessPoolExecutor
) -> list[dict[str, Any]]:
    """Every trial, the first of every cell before the second of any."""
    mark = f"{settings_mark()}, {weights}"
    jobs = {
        f"{cell.name}, {index} [{mark}]": (cell, index, str(data), weights)
        for index in range(max(cells().values()))
        for cell, count in cells().items()
        if index < count
    }
    return journal.finish(jobs, run_trial, pool, "Trials")


if __name__ == "__main__":
    main()
