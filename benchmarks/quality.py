"""Measures what the basic optimization attacks reach, and writes ``results/<key>.json``.

    python benchmarks/quality.py --data CIFAR10_FOLDER [--only dlg idlg ...]

The folder holds ``train.parquet`` and ``test.parquet`` of CIFAR-10 in the Hugging Face image
layout. Figures come from test images only; what was chosen (step sizes, weights) was chosen on
train images. Finished trials are kept in a journal, keyed by their full recipe, so that a killed
study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from leakatlas import models
from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.dlg import DLG
from leakatlas.attacks.optimization.basic.gradinversion import GradInversion
from leakatlas.attacks.optimization.basic.idlg import IDLG
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.blocks import labels
from leakatlas.data import CIFAR10, Box, ImageSet, parquet
from leakatlas.fl import FedSGD, ModelRef, Scenario, replay, stage, state_hash, stream, task_loss
from leakatlas.fl.state import model_state
from leakatlas.metrics import assign, mse, pairwise_mse, psnr
from leakatlas.metrics.images import psnr_of_mse
from leakatlas.metrics.intervals import binomial, bootstrap
from leakatlas.threat import Grant

HARDWARE = "2 CPU cores, no GPU"
DATE = "2026-11-22"
COMMAND = "python benchmarks/quality.py --data cifar10"


class Journal:
    """Finished trials, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.done = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}

    def once(self, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result under ``key``, run now if it is not there."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.done:
            self.done[name] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": name, "result": self.done[name]}) + "\n")
        return dict(self.done[name])


@dataclass(frozen=True)
class Study:
    """Where a study reads and writes."""

    data: Path
    results: Path
    journal: Journal

    def images(self, part: str, count: int) -> ImageSet:
        """The first ``count`` images of a part."""
        return parquet(self.data / f"{part}.parquet", limit=count)

    def write(
        self,
        attack: type[Attack],
        seeds: Sequence[int],
        measures: Sequence[dict[str, Any]],
        recipe: Mapping[str, Any],
    ) -> None:
        """One result file."""
        document = {
            "schema": "leakatlas/result/1",
            "kind": "attack",
            "key": attack.key,
            "code_version": attack.version,
            "recipe": dict(recipe),
            "hardware": HARDWARE,
            "seeds": list(seeds),
            "measures": list(measures),
            "command": f"{COMMAND} --only {attack.key}",
            "date": DATE,
        }
        self.results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2) + "\n"
        (self.results / f"{attack.key}.json").write_text(text, encoding="utf-8")


def mean_of(
    name: str, values: Iterable[float], unit: str, note: str, letter: str
) -> dict[str, Any]:
    """A mean with its 95% bootstrap interval."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    low, high = bootstrap(sample, generator=stream("quality", name))
    return {
        "name": name,
        "value": float(sample.mean()),
        "unit": unit,
        "interval": [low, high],
        "n": len(sample),
        "note": note,
        "letter": letter,
        "vantage": "server",
    }


def share_of(name: str, hits: int, trials: int, note: str, letter: str) -> dict[str, Any]:
    """A share with its 95% Wilson interval."""
    low, high = binomial(hits, trials)
    return {
        "name": name,
        "value": hits / trials,
        "unit": "",
        "interval": [low, high],
        "n": trials,
        "note": note,
        "letter": letter,
        "vantage": "server",
    }


def attacked(
    scenario: Scenario,
    attack: Attack,
    victims: ImageSet,
    model: torch.nn.Module | None = None,
    *,
    box: Box,
) -> dict[str, Any]:
    """One attack on one batch; pixels are clamped before they are scored."""
    played = stage(scenario, model=model, victims=victims, box=box)
    trial = harness.run_trial(played, attack, seed=scenario.seed)
    found, truth = trial.images.clamp(0, 1), trial.truth.images
    if len(found) == len(truth) == 1:
        scores = psnr(found, truth)
    else:
        # every original meets its own candidate; one without is scored as a grey image
        scores = psnr(torch.full_like(truth, 0.5), truth)
        cost = pairwise_mse(found, truth)
        for original, candidate in enumerate(assign(cost).of_original):
            if candidate is not None:
                scores[original] = psnr_of_mse(cost[candidate, original])
    recovered = trial.found.labels
    return {
        "psnr": scores.tolist(),
        "mse": float(mse(found, truth).mean()) if len(found) == len(truth) == 1 else None,
        "labels": recovered is not None
        and sorted(recovered.tolist()) == sorted(trial.truth.labels.tolist()),
        "status": trial.found.status,
        "seconds": trial.found.seconds,
        **{name: float(value) for name, value in trial.found.notes.items()},
    }


def key_of(attack: Attack, scenario: Scenario, **rest: Any) -> dict[str, Any]:
    """What a trial is filed under."""
    return {"attack": attack.recipe(scenario.seed, scenario.to_json()).content_hash, **rest}


# -- the studies -------------------------------------------------------------------------------


def inverting_gradients(study: Study) -> None:
    """Published and tuned preset on the ConvNet: one image, label granted, fresh weights."""
    images, seeds = study.images("test", 16), (0, 1, 2)
    presets = {
        "published": InvertingGradients(steps=2_000),
        "tuned": InvertingGradients.tuned(),
    }
    notes = {
        "published": "cosine, signed Adam 0.1, TV 1e-1, 2,000 iterations",
        "tuned": "relative L2, signed steps 0.3 along a cosine, TV 3e-3, 400 iterations; "
        "chosen on train images",
    }
    measures = []
    for preset, attack in presets.items():
        by_image: list[list[float]] = [[] for _ in range(len(images))]
        for seed in seeds:
            for index in range(len(images)):
                scenario = Scenario(
                    model=ModelRef("builtin", "convnet", {"classes": 10, "seed": seed}),
                    grants=frozenset({Grant.LABELS}),
                    seed=seed,
                )

                def run(i: int = index, a: Attack = attack, s: Scenario = scenario) -> Any:
                    return attacked(s, a, images.subset([i]), box=CIFAR10)

                done = study.journal.once(key_of(attack, scenario, preset=preset, image=index), run)
                by_image[index] += done["psnr"]
        scores = [score for image in by_image for score in image]
        note = (
            f"{notes[preset]}; ConvNet 3-32-64-64-128 without BN, first 16 test images x 3 seeds; "
            "the interval resamples images"
        )
        over_seeds = [sum(image) / len(image) for image in by_image]
        measures += [
            {**mean_of(f"psnr_{preset}", over_seeds, "dB", note, "B"), "n": len(scores)},
            share_of(
                f"psnr_above_20_{preset}",
                sum(s > 20 for s in scores),
                len(scores),
                notes[preset],
                "B",
            ),
        ]
    study.write(
        InvertingGradients,
        seeds,
        measures,
        {preset: attack.to_json() for preset, attack in presets.items()},
    )


def dlg(study: Study) -> None:
    """Machine precision on the sigmoid LeNet, in float64."""
    images = study.images("test", 10)
    attack = DLG.exact()
    trials = []
    for index in range(len(images)):
        scenario = Scenario(
            model=ModelRef("builtin", "lenet", {"classes": 10, "seed": 0}), letter="A", seed=0
        )

        def run(i: int = index, s: Scenario = scenario) -> Any:
            model = s.model.build().double()
            return attacked(s, attack, images.subset([i]), model, box=Box.unit(3))

        trials.append(study.journal.once(key_of(attack, scenario, image=index), run))
    note = (
        "first 10 test images, labels unknown, LeNet of the paper, client and attack in float64, "
        "line search, at most 2 restarts"
    )
    n = len(trials)
    measures = [
        share_of("mse_below_1e-10", sum(t["mse"] < 1e-10 for t in trials), n, note, "A"),
        share_of("mse_below_1e-6", sum(t["mse"] < 1e-6 for t in trials), n, note, "A"),
        share_of("label_accuracy", sum(t["labels"] for t in trials), n, note, "A"),
        mean_of(
            "log10_mse", [torch.tensor(t["mse"]).log10().item() for t in trials], "", note, "A"
        ),
    ]
    study.write(DLG, (0,), measures, {"attack": attack.to_json()})


def idlg(study: Study) -> None:
    """The three label rules on fresh networks."""
    images = study.images("test", 1_000)
    measures = []
    for act in ("sigmoid", "tanh"):

        def run(act: str = act) -> dict[str, Any]:
            return label_hits(images, act)

        hits = study.journal.once({"study": "idlg labels", "act": act, "n": len(images)}, run)
        for rule in ("paper", "bias", "sum"):
            note = f"{rule} rule; fresh LeNet with {act} features for every test image"
            measures.append(
                share_of(f"label_accuracy_{rule}_{act}", hits[rule], len(images), note, "A")
            )
    study.write(IDLG, (0,), measures, {"rules": ["paper", "bias", "sum"], "nets": 1_000})


def label_hits(images: ImageSet, act: str) -> dict[str, Any]:
    """How many labels each rule finds, a fresh LeNet for every image."""
    rules: tuple[Literal["paper", "bias", "sum"], ...] = ("paper", "bias", "sum")
    hits = dict.fromkeys(rules, 0)
    for index in range(len(images)):
        model = models.build("lenet", act=act, seed=index)
        head = labels.find_head(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        x, y = images.images[index : index + 1], images.labels[index : index + 1]
        g = replay.gradient(model, parameters, {}, x, y, create_graph=False)
        for rule in rules:
            hits[rule] += int(labels.idlg(g, head, rule=rule) == y)
    return {rule: found for rule, found in hits.items()}


def gradinversion(study: Study) -> None:
    """Ablations on a small ConvNet with BN: four distinct labels, labels not granted."""
    variants = {
        "full": ABLATION,
        "running_bn": replace(ABLATION, bn="running"),
        "no_bn": replace(ABLATION, bn_weight=0),
        "no_group": replace(ABLATION, seeds=1, group_weight=0),
    }
    images = study.images("test", 200)
    batches = distinct(images, 4)[:BATCHES]
    reference = ModelRef("builtin", "convnet-bn", {"width": 8})
    model = briefly_trained(reference, study.images("train", 10_000))
    weights = state_hash(model_state(model))
    scores: dict[str, list[float]] = {name: [] for name in variants}
    right = 0
    for seed, batch in enumerate(batches):
        for name, attack in variants.items():
            scenario = Scenario(
                model=reference,
                letter="E",
                examples=4,
                protocol=FedSGD(mode="train"),
                grants=frozenset({Grant.BATCH_BN}),
                seed=seed,
            )

            def run(b: list[int] = batch, a: Attack = attack, s: Scenario = scenario) -> Any:
                return attacked(s, a, images.subset(b), model, box=CIFAR10)

            done = study.journal.once(key_of(attack, scenario, batch=batch, weights=weights), run)
            scores[name].append(sum(done["psnr"]) / 4)
            right += bool(done["labels"]) if name == "full" else 0
    note = (
        f"{len(batches)} batches of 4 test images with distinct labels; ConvNet of width 8 with "
        "BN, 2 epochs on 10,000 train images; client in train mode; "
        f"{ABLATION.seeds} searches of {ABLATION.steps} iterations, their mean returned "
        "(no_group: one search); mean over a batch"
    )
    measures = [mean_of(f"psnr_{name}", scores[name], "dB", note, "E") for name in variants]
    for name in ("running_bn", "no_bn", "no_group"):
        gained = [f - a for f, a in zip(scores["full"], scores[name], strict=True)]
        measures.append(mean_of(f"psnr_full_minus_{name}", gained, "dB", f"paired; {note}", "E"))
    grey = [
        float(psnr(torch.full((4, 3, 32, 32), 0.5), images.images[batch]).mean())
        for batch in batches
    ]
    measures.append(mean_of("psnr_grey_image", grey, "dB", "null baseline: 0.5 everywhere", "E"))
    measures.append(
        share_of("batches_with_all_labels_right", right, len(batches), "column minimum", "E")
    )
    study.write(
        GradInversion,
        range(len(batches)),
        measures,
        {name: attack.to_json() for name, attack in variants.items()},
    )


ABLATION = GradInversion(
    steps=300, warmup=10, seeds=3, match_weight=0.1, tv_weight=1e-2, bn_weight=0.3, noise=0.02,
    consensus="lazy", answer="consensus",
)  # fmt: skip
"""A short run whose weights suit 32x32 images; chosen on train images."""

BATCHES = 8


def briefly_trained(reference: ModelRef, images: ImageSet) -> torch.nn.Module:
    """Two epochs of Adam: enough for running statistics and features that mean something."""
    model = reference.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    x = CIFAR10.normalize(images.images)
    for _ in range(2):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            task_loss(model(x[batch]), images.labels[batch]).backward()
            optimizer.step()
    return model


def distinct(images: ImageSet, size: int) -> list[list[int]]:
    """Disjoint batches of distinct labels, in file order."""
    batches: list[list[int]] = []
    left = list(range(len(images)))
    while True:
        chosen: list[int] = []
        for index in left:
            if len(chosen) < size and int(images.labels[index]) not in [
                int(images.labels[other]) for other in chosen
            ]:
                chosen.append(index)
        if len(chosen) < size:
            return batches
        left = [index for index in left if index not in chosen]
        batches.append(chosen)


STUDIES = {
    "idlg": idlg,
    "dlg": dlg,
    "gradinversion": gradinversion,
    "inverting_gradients": inverting_gradients,
}


def main() -> None:
    """Run the studies that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    parser.add_argument("--only", nargs="+", choices=sorted(STUDIES), default=list(STUDIES))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--journal", type=Path, default=Path("build/quality.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments.data, arguments.results, Journal(arguments.journal))
    for name in arguments.only:
        STUDIES[name](study)


if __name__ == "__main__":
    main()
