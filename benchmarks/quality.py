"""Measures what the basic optimization attacks reach, and writes ``results/<key>.json``.

    python benchmarks/quality.py inverting_gradients --data CIFAR10_FOLDER

The folder holds ``train.parquet`` and ``test.parquet`` of CIFAR-10 in the Hugging Face image
layout. Figures come from test images only; whatever was chosen (step sizes, weights) was chosen
on train images. Finished trials are kept in a journal, so that a killed study goes on where it
stopped; the journal is keyed by the full recipe of each trial.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import leakatlas
from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit import harness
from leakatlas.data import CIFAR10, Box, ImageSet, parquet
from leakatlas.fl import FedSGD, ModelRef, Scenario, stage, stream
from leakatlas.metrics import images as image_metrics
from leakatlas.metrics.intervals import bootstrap
from leakatlas.threat import Grant

SEEDS = (0, 1, 2)


class Journal:
    """Finished trials, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.done[entry["key"]] = entry["result"]

    def once(self, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under ``key``, run now if it is not there."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.done:
            self.done[name] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": name, "result": self.done[name]}) + "\n")
        return self.done[name]


@dataclass(frozen=True)
class Study:
    """Where a study reads and writes."""

    data: Path
    results: Path
    journal: Journal

    def images(self, part: str, count: int) -> ImageSet:
        """The first ``count`` images of a part."""
        return parquet(self.data / f"{part}.parquet", limit=count)


def psnr_trial(
    scenario: Scenario, attack: Attack, victims: ImageSet, box: Box, *, seed: int
) -> dict[str, Any]:
    """One attack on one batch, scored on clamped pixels."""
    trial = harness.run_trial(stage(scenario, victims=victims, box=box), attack, seed=seed)
    psnr = image_metrics.psnr(trial.images.clamp(0, 1), trial.truth.images)
    return {
        "psnr": float(psnr.mean()),
        "status": trial.found.status,
        "seconds": trial.found.seconds,
        **{name: float(value) for name, value in trial.found.notes.items()},
    }


def measure(
    name: str, values: Iterable[float], unit: str, note: str, *, n: int | None = None
) -> dict[str, Any]:
    """A mean with its bootstrap interval."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    interval = bootstrap(sample, generator=stream("quality", name))
    return {
        "name": name,
        "value": float(sample.mean()),
        "unit": unit,
        "interval": [interval.low, interval.high],
        "n": len(sample) if n is None else n,
        "note": note,
    }


def inverting_gradients(study: Study) -> None:
    """Published and tuned preset on the ConvNet, one image, label granted."""
    images = study.images("test", 16)
    for preset, attack in (
        ("published", InvertingGradients(steps=2_000)),
        ("tuned", InvertingGradients.tuned()),
    ):
        for seed in SEEDS:
            for index in range(len(images)):
                scenario = Scenario(
                    model=ModelRef("builtin", "convnet", {"classes": 10, "seed": seed}),
                    grants=frozenset({Grant.LABELS}),
                    seed=seed,
                )
                study.journal.once(
                    {"attack": attack.recipe(seed, scenario.to_json()).content_hash,
                     "preset": preset, "image": index},
                    lambda: psnr_trial(scenario, attack, images.subset([index]), CIFAR10, seed=seed),
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset")
    torch.set_num_threads(1)
    inverting_gradients(Study(Path("/work/shared/data/cifar10"), Path("results"), Journal(Path("/tmp/quality/inverting_gradients.jsonl"))))
