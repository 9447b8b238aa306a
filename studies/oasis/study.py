"""Whether an image leaks in some quarter turn, and the accuracy of a federation that trains."""

from __future__ import annotations

import time
from typing import Any

import torch

from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.harness import Trial
from leakatlas.bench.schema import Images
from leakatlas.fl import Client, FedAVG, Federation, Stage
from leakatlas.fl.view import defense_from_json
from leakatlas.metrics.assignment import pairwise_mse
from leakatlas.metrics.images import psnr_of_mse

RECOGNISABLE = 20.0
CLIENTS, EXAMPLES, ROUNDS = 8, 100, 12
LR = 0.03
TRAINING = "parquet:cifar10/train.parquet"


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """DB of the candidate nearest to every victim, turned as suits best.

    A copy may come back for the original; whoever sees it sees the image. The grey image is among
    the candidates, so that nothing found is no infinite error.
    """
    del stage
    grey = torch.full_like(trial.truth.images[:1], 0.5)
    found = trial.images.to(grey).clamp(0, 1)
    turned = [found.rot90(quarters, (-2, -1)) for quarters in range(4)]
    cost = pairwise_mse(torch.cat([grey, *turned]), trial.truth.images).min(0).values
    reached = [float(value) for value in psnr_of_mse(cost).clamp(max=100.0)]
    return {
        "psnr_any_turn": reached,
        "recognisable_in_any_turn": [float(value >= RECOGNISABLE) for value in reached],
    }


def measure(cell: Cell) -> dict[str, float]:
    """Accuracy on test images, and CPU seconds of training."""
    torch.set_num_threads(1)
    first = CLIENTS * EXAMPLES
    size = cell.case.victims.size
    public = scene.images(Images(set=TRAINING, count=first, size=size), cell.data)
    test = scene.images(cell.case.victims, cell.data)
    box = scene.pixel_space(cell.case, public.channels)
    x, y = box.normalize(public.images), public.labels
    clients = {
        number: Client(x[part], y[part])
        for number, part in enumerate(torch.arange(first).split(EXAMPLES))
    }
    federation = Federation(
        scene.network(cell)[1], clients,
        FedAVG(epochs=2, batch_size=20, lr=LR, momentum=0.9, shuffle=True),
        tuple(defense_from_json(defense) for defense in cell.case.defenses), seed=cell.seed,
    )  # fmt: skip
    begun = time.process_time()
    for _ in range(ROUNDS):
        federation.play_round(apply=True)
    seconds = time.process_time() - begun
    model = federation.evaluation_model(0)
    with torch.no_grad():
        right = model(box.normalize(test.images)).argmax(1) == test.labels
    return {"accuracy": float(right.double().mean()), "cpu_seconds": seconds}
