"""Measures what the attacks with a generative prior reach, and writes ``results/<key>.json``.

    python benchmarks/generative.py --data CIFAR10_FOLDER

The folder holds ``train.parquet`` and ``test.parquet`` of CIFAR-10 in the Hugging Face image
layout. Victims are test images; the shipped generator was learned on train images only (its card
says which), the null baselines use train images, and the tuned preset was chosen on the bundled
surrogate photos. Labels are never granted. Finished trials are kept in a journal under
.cache, keyed by the full recipe of the trial, so that a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.bench import harness
from leakatlas.data import CIFAR10, ImageSet, parquet
from leakatlas.fl import ModelRef, Scenario, stage, stream
from leakatlas.metrics import bootstrap, score

HARDWARE = "2 CPU cores, no GPU"
DATE = "2026-11-22"
SEED = 0


@dataclass(frozen=True)
class Setting:
    """One line of the results.

    Args:
        name: What the line is called.
        attack: The recipe.
        images: Victims.
        batch: Images per update.
        weights: Shipped weights of the victims' ConvNet; untrained if None.
        note: What a reader must know.
    """

    name: str
    attack: GIAS
    images: int
    batch: int = 1
    weights: str | None = None
    note: str = ""


TUNED = GIAS.tuned()
SETTINGS = (
    Setting("tuned", TUNED, 8, note="untrained ConvNet, one image an update"),
    Setting(
        "tuned, latent search only", replace(TUNED, generator_steps=0), 8,
        note="ablation T2 = 0; untrained ConvNet, one image an update",
    ),
    Setting(
        "tuned, trained model", TUNED, 4, weights="convnet-cifar10",
        note="ConvNet trained on CIFAR-10, one image an update",
    ),
    Setting("tuned, batch of 4", TUNED, 4, batch=4, note="untrained ConvNet, distinct labels"),
    Setting(
        "published", GIAS(), 1,
        note="defaults (ImageNet 32 row: T1 = 500, T2 = 5000, R = 3); untrained ConvNet; "
        "the paper's ResNet-18 and StyleGAN2 prior are replaced",
    ),
)  # fmt: skip


def trial(setting: Setting, victims: ImageSet, public: ImageSet) -> dict[str, Any]:
    """Attack one update and score it by the common protocol."""
    torch.set_num_threads(1)
    scenario = Scenario(
        model=ModelRef("builtin", "convnet", {"classes": 10, "seed": SEED}),
        weights=setting.weights,
        data="cifar10/test",
        examples=setting.batch,
        letter="D",
        seed=SEED,
    )
    found = harness.run_trial(
        stage(scenario, victims=victims, box=CIFAR10), setting.attack, seed=SEED
    )
    result = score(
        found.images,
        found.truth.images,
        public=public.images,
        labels=found.truth.labels,
        recovered_labels=found.found.labels,
        classes=10,
        public_labels=public.labels,
    )
    assert found.found.recipe is not None
    return {
        "psnr": [image.psnr for image in result.images],
        "ssim": [image.ssim for image in result.images],
        "labels": [bool(image.label) for image in result.images],
        "baselines": {name: baseline.psnr for name, baseline in result.baselines.items()},
        "notes": dict(found.found.notes),
        "status": found.found.status,
        "seconds": found.found.seconds,
        "recipe": found.found.recipe.to_json(),
    }


def batches(images: ImageSet, setting: Setting) -> list[ImageSet]:
    """The first victims in file order; several in one update have distinct labels."""
    if setting.batch == 1:
        return [images.subset([i]) for i in range(setting.images)]
    chosen: list[int] = []
    for index, label in enumerate(images.labels.tolist()):
        if len(chosen) < setting.images and label not in images.labels[chosen].tolist():
            chosen.append(index)
    parts = torch.tensor(chosen).split(setting.batch)
    return [images.subset(part) for part in parts]


class Journal:
    """Finished trials, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.done = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}

    def once(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under ``key``, run now if it is not there."""
        if key not in self.done:
            self.done[key] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": self.done[key]}) + "\n")
        return dict(self.done[key])


def measure(name: str, values: Sequence[float], unit: str, note: str) -> dict[str, Any]:
    """A mean over images with its bootstrap interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    if len(values) == 1:
        one = round(float(sample), 4)
        return {"name": name, "value": one, "unit": unit, "interval": None, "n": 1, "note": note}
    interval = bootstrap(sample, generator=stream("benchmark", name))
    return {
        "name": name,
        "value": round(float(sample.mean()), 4),
        "unit": unit,
        "interval": [round(interval.low, 4), round(interval.high, 4)],
        "n": len(values),
        "note": note,
    }


def measures(setting: Setting, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of one setting."""
    every = {
        name: [float(v) for result in results for v in result[name]]
        for name in ("psnr", "ssim", "labels")
    }
    baselines = {
        name: sum(result["baselines"][name] for result in results) / len(results)
        for name in results[0]["baselines"]
    }
    best = max(baselines, key=lambda name: baselines[name])
    null = f"best null baseline ({best}): {baselines[best]:.1f} dB"
    failed = sum(result["status"] == "failed" for result in results)
    note = f"{setting.note}; {null}; {failed} of {len(results)} trials failed"
    seconds = [float(result["seconds"]) for result in results]
    return [
        measure(f"psnr ({setting.name})", every["psnr"], "dB", note),
        measure(f"ssim ({setting.name})", every["ssim"], "", setting.note),
        measure(f"label accuracy ({setting.name})", every["labels"], "", setting.note),
        measure(f"seconds per update ({setting.name})", seconds, "s", "one thread, shared machine"),
    ]


def main() -> None:
    """Run what the journal lacks, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--journal", type=Path, default=Path(".cache") / "gias.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    test = parquet(arguments.data / "test.parquet", 32, limit=64)
    public = parquet(arguments.data / "train.parquet", 32, limit=2_000)
    journal = Journal(arguments.journal)
    lines: list[dict[str, Any]] = []
    recipes: dict[str, Any] = {}
    for setting in SETTINGS:
        results = []
        for victims in batches(test, setting):
            key = json.dumps(
                [GIAS.key, GIAS.version, setting.attack.to_json(), setting.weights, SEED,
                 victims.fingerprint()]
            )  # fmt: skip
            results.append(
                journal.once(key, lambda s=setting, v=victims: trial(s, v, public))  # type: ignore[misc]  # defaults bind the loop's values
            )
        lines += measures(setting, results)
        recipes[setting.name] = results[0]["recipe"]
    document = {
        "schema": "leakatlas/result/1",
        "kind": "attack",
        "key": GIAS.key,
        "code_version": GIAS.version,
        "recipe": {
            "first_trial_of_each_setting": recipes,
            "settings": [_plain(s) for s in SETTINGS],
        },
        "hardware": HARDWARE,
        "seeds": [SEED],
        "measures": lines,
        "command": "python benchmarks/generative.py --data cifar10",
        "date": DATE,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2) + "\n"
    (arguments.results / f"{GIAS.key}.json").write_text(text, encoding="utf-8")


def _plain(setting: Setting) -> dict[str, Any]:
    return {**asdict(setting), "attack": setting.attack.to_json()}


if __name__ == "__main__":
    main()
