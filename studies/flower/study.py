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
AUDIT: dict[str, dict[str, Any]] = {
    "quickstart": {
        "attacks": ["inverting_gradients"],
        "attack_parameters": {"inverting_gradients": {"steps": 200}},
        "budget": "paper",
        "upper_bound": False,
    },
    "fc": {"attacks": ["spear"], "budget": "paper", "upper_bound": False},
}
"""By network: where pixels go through convolutions, and where they meet a linear layer."""


def measure(cell: Cell) -> dict[str, float | list[float]]:
    """What the name of the case says, by the functions of the example."""
    sys.path[:0] = [str(APP)]
    example, engine = importlib.import_module("audit"), importlib.import_module("engine")
    with tempfile.TemporaryDirectory() as there, engine.engine(f"{there}/flwr") as environment:
        release = {"Flower": float(".".join(version("flwr").split(".")[:2]))}
        if cell.label.startswith("costs"):
            costs = importlib.import_module("costs").costs
            spent: dict[str, float] = costs(environment, there, cell.label.split(", ")[1])
            return {**release, **spent}
        network = "fc" if cell.case.model.builtin == "fc" else "quickstart"
        settings: dict[str, Any] = {"examples": cell.case.batch, "network": network}
        settings["defense"] = "local_dp" if "LocalDpMod" in cell.label else "none"
        folder = Path(there) / "captures"
        engine.run(environment, leakatlas_folder=folder, **settings)
        noisy = settings["defense"] != "none"
        return {**release, **found(example, folder, network, noisy=noisy)}


def found(
    example: Any, folder: Path, network: str, *, noisy: bool
) -> dict[str, float | list[float]]:
    """The doctor's answers to right and wrong descriptions, and what comes out at every place."""
    right = example.diagnose(folder, network=network)
    figures: dict[str, float | list[float]] = {
        "residual": max(one.replay.residual for one in right),
        "constraints per unknown": next(
            m.value for m in right[0].measures if m.name == "constraints_per_unknown"
        ),
    }
    for name, mistake, words in (
        ("optimizer", {"momentum": 0.9}, "plain SGD"),
        ("learning rate", {"lr": 0.1}, "learning rate"),
    ):
        wrong = [one.replay for one in example.diagnose(folder, network=network, **mistake)]
        named = [float(not c.expected and words in c.explanation) for c in wrong]
        figures[f"wrong {name} named"] = named
    if noisy:
        deviation, _ = example.noise(folder)
        promise = example.promised(folder)
        figures |= {"noise": deviation, "noise over promised": deviation / promise.sigma}
        return figures | {"epsilon of one round": promise.worth()}
    for place in example.PLACES:
        report = example.attack(folder, place, network=network, **AUDIT[network])
        scores = [run.scores for run in report.runs if run.scores]
        best = max(scores, key=lambda one: one.psnr.mean)
        figures |= {
            f"{place}, psnr": [image.psnr for image in best.images],
            f"{place}, exact": [float(image.exact) for image in best.images],
            f"{place}, null": [image.null_psnr for image in best.images],
            f"{place}, labels": max((s.labels.le_acc for s in scores if s.labels), default=0.0),
        }
    return figures
