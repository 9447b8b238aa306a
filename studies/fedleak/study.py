"""Rehearsed attacks, which no recipe names beforehand, and the PSNR that all cases share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.fedleak import FedLeak
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.harness import Trial
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import strangers
from leakatlas.fl import Stage
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.images import psnr_of_mse

ITERATIONS = 100
ATTACKS: dict[str, type[Attack]] = {
    "chosen_fedleak": FedLeak, "chosen_inverting_gradients": InvertingGradients
}  # fmt: skip


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """PSNR of every image under the best assignment."""
    del stage
    return {"quality": quality(trial.images, trial.truth.images)}


def measure(cell: Cell) -> dict[str, Any]:
    """The same for what rehearsed best, at the same length; else for the mean image."""
    torch.set_num_threads(1)
    stage = scene.staged(cell)
    truth = stage.victims[0].images
    names = {m if isinstance(m, str) else m.name for m in cell.case.measures}
    asked = next((name for name in ATTACKS if name in names), None)
    if asked is None:
        assert stage.surrogate is not None
        mean = stage.surrogate.images.mean(0, keepdim=True)
        return {"quality": quality(mean.expand_as(truth), truth)}
    view = stage.view([stage.federation.play_round()])
    variants = ATTACKS[asked].variants()
    quiet = Watch(conduct=Conduct(execution="eager"))
    with tempfile.TemporaryDirectory() as empty:  # nothing is taken from earlier rehearsals
        best = rehearse(
            view, variants, strangers(stage.victims[0]), planned=ITERATIONS, images=1,
            watch=quiet, seed=cell.seed, cache=Path(empty),
        ).variant  # fmt: skip
    found = variants[best].lasting(ITERATIONS)(view, seed=cell.seed, watch=quiet)
    images = stage.box.denormalize(found.images)
    return {"quality": quality(images, truth), asked: [float(list(variants).index(best))]}


def quality(images: Tensor, truth: Tensor) -> list[float]:
    """DB of every true image, against the candidate that the best assignment gives it."""
    cost = pairwise_mse(images.to(truth).clamp(0, 1), truth)
    pairs = assign(cost).of_original
    return [
        float(psnr_of_mse(cost[row, column])) for column, row in enumerate(pairs) if row is not None
    ]
