"""What adversaries that hold the defense reach, and what eight clients lose by it.

The adversary rehearses once for a network and a defense, on its public images, and then attacks
every client; oblivious, it runs the same variant and compares with the plain replay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas import data
from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.fl import Client, Federation, FedSGD, Stage, View
from leakatlas.fl.view import defense_from_json
from leakatlas.metrics.images import psnr

ITERATIONS = 60
CLIENTS, EXAMPLES, TEST, ROUNDS = 8, 40, 300, 25
RATES = (0.5, 0.15)
"""Server step sizes tried."""


def measure(cell: Cell) -> dict[str, Any]:
    """Accuracy, or the images that are reached, as the case asks."""
    torch.set_num_threads(1)
    wanted = {m if isinstance(m, str) else m.name for m in cell.case.measures}
    return utility(cell) if "accuracy" in wanted else leakage(cell)


def leakage(cell: Cell) -> dict[str, Any]:
    """DB of every client's image under each adversary."""
    stage = scene.staged(cell)
    record = stage.federation.play_round()
    views = [stage.view([record], target=i) for i in stage.victims]
    surrogate = views[0].surrogate
    variants = InvertingGradients.variants()
    with tempfile.TemporaryDirectory() as empty:  # nothing is taken from earlier rehearsals
        chosen = rehearse(
            views[0], variants, surrogate, planned=ITERATIONS, images=1, watch=_quiet(),
            seed=cell.seed, cache=Path(empty),
        ).variant  # fmt: skip
    attack = variants[chosen].lasting(ITERATIONS)
    mean = surrogate.images.mean(0, keepdim=True)
    return {
        "psnr_rehearsed": _reached(attack, views, stage, cell.seed),
        "psnr_oblivious": _reached(
            attack, [v.without("defenses") for v in views], stage, cell.seed
        ),
        "psnr_mean_image": [_psnr(mean, stage, i) for i in stage.victims],
        "relative_error": _error(cell, [v.update.tensors for v in views]),
    }


def _quiet() -> Watch:
    return Watch(conduct=Conduct(execution="eager"))


def _reached(attack: Attack, views: Sequence[View], stage: Stage, seed: int) -> list[float]:
    found = [attack(view, seed=seed, watch=_quiet()).images for view in views]
    return [
        _psnr(stage.box.denormalize(images).clamp(0, 1), stage, i)
        for i, images in zip(stage.victims, found, strict=True)
    ]


def _psnr(images: Tensor, stage: Stage, target: int) -> float:
    return float(psnr(images, stage.victims[target].images))


def _error(cell: Cell, sent: Sequence[Any]) -> list[float]:
    """Of every upload, against that of the same client without the defense."""
    plain = scene.staged(_undefended(cell))
    record = plain.federation.play_round()
    errors = []
    for i, tensors in enumerate(sent):
        honest = plain.view([record], target=i).update.tensors
        u, v = (torch.cat([t[n].flatten() for n in honest]) for t in (tensors, honest))
        errors.append(float((u - v).norm() / v.norm()))
    return errors


def _undefended(cell: Cell) -> Cell:
    return replace(cell, case=cell.case.model_copy(update={"defenses": ()}))


def utility(cell: Cell) -> dict[str, Any]:
    """Accuracy on test images at the step size that validates best, and that step size."""
    runs = [_trained(cell, lr) for lr in RATES]
    _, accuracy, lr = max(runs)
    return {"accuracy": accuracy, "lr": lr}


def _trained(cell: Cell, lr: float) -> tuple[float, float, float]:
    """Accuracy on validation and on test images, and the step size."""
    images, box = data.digits(), scene.pixel_space(cell.case, 1)
    x, y = box.normalize(images.images), images.labels
    parts = torch.arange(CLIENTS * EXAMPLES).split(EXAMPLES)
    defenses = tuple(defense_from_json(defense) for defense in cell.case.defenses)
    federation = Federation(
        scene.network(cell)[1], {k: Client(x[part], y[part]) for k, part in enumerate(parts)},
        FedSGD(lr=lr, mode="train"), defenses, seed=cell.seed,
    )  # fmt: skip
    for _ in range(ROUNDS):
        federation.play_round(apply=True)
    model, first = federation.evaluation_model(0), CLIENTS * EXAMPLES
    with torch.no_grad():
        right = (
            model(x[first : first + 2 * TEST]).argmax(1) == y[first : first + 2 * TEST]
        ).double()
    return float(right[:TEST].mean()), float(right[TEST:].mean()), lr
