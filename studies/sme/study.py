"""One network and one number of local steps a cell: both attacks rehearse, then meet all clients.

All times are CPU seconds of one thread. Each side rehearses the first variants that it declares on
photos of strangers, at the length of the run, and takes what served best there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.attacks.optimization.basic.sme import SME
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import ImageSet, strangers
from leakatlas.fl import View
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr_of_mse

ITERATIONS = 80
LONG = 1_000
"""Iterations of the published setting; one takes no longer for more local steps."""

TRIED = 3
"""Variants that a rehearsal tries, each at full length on one batch."""

SIDES: Mapping[str, type[Attack]] = {"sme": SME, "replay": InvertingGradients}


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of every image, CPU seconds of every client, and what each side chose."""
    torch.set_num_threads(1)
    stage = scene.staged(cell)
    record = stage.federation.play_round()
    views = {client: stage.view([record], target=client) for client in sorted(stage.victims)}
    public = strangers(stage.victims[0])
    average = mean_image(public.images)
    null = {client: constant(average, stage.victims[client]) for client in views}
    found = {"psnr_mean_image": [dB for values in null.values() for dB in values]}
    for side, cls in SIDES.items():
        attack, cost = rehearsed(views[0], cls, public, cell.seed)
        found[f"rehearsal_cpu_seconds_{side}"] = [cost]
        found[f"variant_{side}"] = [float(list(cls.variants().values()).index(attack))]
        for client, view in views.items():
            for name, length in lengths(side).items():
                begun = time.process_time()
                made = attack.lasting(length)(view, seed=cell.seed, watch=quiet())
                found.setdefault(f"cpu_seconds_{name}", []).append(time.process_time() - begun)
                images = stage.box.denormalize(made.images).clamp(0, 1)
                reached = matched(images, stage.victims[client], null[client])
                found.setdefault(f"psnr_{name}", []).extend(reached)
                if name == "long_sme":
                    found.setdefault("position", []).append(made.notes["alpha"])
    for name in ("sme", "long_sme"):
        pairs = zip(found[f"psnr_{name}"], found["psnr_replay"], strict=True)
        found[f"{name}_minus_replay"] = [sme - replay for sme, replay in pairs]
    return found


def lengths(side: str) -> dict[str, int]:
    """The runs of one side, by name."""
    return {side: ITERATIONS} | ({"long_sme": LONG} if side == "sme" else {})


def quiet() -> Watch:
    """No budget, and slopes computed in the one way that repeats bit for bit."""
    return Watch(conduct=Conduct(execution="eager"))


def rehearsed(view: View, cls: type[Attack], public: ImageSet, seed: int) -> tuple[Attack, float]:
    """The variant that rebuilds the adversary's own images best, and the CPU seconds it took."""
    variants = dict(list(cls.variants().items())[:TRIED])
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as empty:
        best = rehearse(
            view, variants, public, planned=ITERATIONS, images=1, watch=quiet(), seed=seed,
            cache=Path(empty),
        )  # fmt: skip
    return variants[best.variant], time.process_time() - begun


def constant(image: Tensor, victims: ImageSet) -> list[float]:
    """DB of one image ``(C, H, W)`` held against every victim."""
    errors = (image - victims.images.double()).square().flatten(1).mean(1)
    return [float(value) for value in psnr_of_mse(errors)]


def matched(images: Tensor, victims: ImageSet, null: list[float]) -> list[float]:
    """DB of every victim, under the best one-to-one matching of a client's candidates.

    A victim without a candidate gets the null baseline.
    """
    cost = pairwise_mse(images, victims.images)
    return [
        null[column] if row is None else float(psnr_of_mse(cost[row, column]))
        for column, row in enumerate(assign(cost).of_original)
    ]
