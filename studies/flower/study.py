"""The example app under Flower's own engine; run it in Flower's environment (make bench-flower)."""

from __future__ import annotations

import importlib
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leakatlas.bench import study
from leakatlas.bench.cells import Cell

APP = study.default_folder().parent / "examples" / "flower"
STEPS = 2_000


def measure(cell: Cell) -> dict[str, float | list[float]]:
    """What the name of the case says, by the functions of the example."""
    sys.path[:0] = [str(APP)]
    example, engine = importlib.import_module("audit"), importlib.import_module("engine")
    with tempfile.TemporaryDirectory() as there, engine.engine(f"{there}/flwr") as environment:
        release = {"Flower": float(".".join(version("flwr").split(".")[:2]))}
        if cell.label.startswith("costs"):
            costs = importlib.import_module("costs").costs
            return release | costs(environment, there, cell.label.split(", ")[1])
        local_dp = "local_dp" if cell.label == "LocalDpMod" else "none"
        folder = Path(there) / "captures"
        engine.run(environment, leakatlas_folder=folder, defense=local_dp, examples=cell.case.batch)
        return release | found(example, folder, noisy=local_dp != "none")


def found(example: Any, folder: Path, *, noisy: bool) -> dict[str, float | list[float]]:
    """The doctor's answers to right and wrong descriptions, and what comes out at every place."""
    right = example.diagnose(folder)
    figures: dict[str, float | list[float]] = {"residual": max(check.residual for check in right)}
    for name, mistake, words in (
        ("optimizer", {"momentum": 0.9}, "plain SGD"),
        ("learning rate", {"lr": 0.1}, "learning rate"),
    ):
        wrong = example.diagnose(folder, **mistake)
        named = [float(not c.expected and words in c.explanation) for c in wrong]
        figures[f"wrong {name} named"] = named
    if noisy:
        deviation, _ = example.noise(folder)
        promise = example.promised(folder)
        figures |= {"noise": deviation, "noise over promised": deviation / promise.sigma}
        figures["epsilon of one round"] = promise.worth()
    for place in example.PLACES:
        scores = [r.scores for r in example.attack(folder, place, steps=STEPS).runs if r.scores]
        best = max(scores, key=lambda one: one.psnr.mean)
        figures |= {
            f"{place}, psnr": [image.psnr for image in best.images],
            f"{place}, null": [image.null_psnr for image in best.images],
            f"{place}, labels": max(one.labels.le_acc for one in scores if one.labels),
        }
    return figures
