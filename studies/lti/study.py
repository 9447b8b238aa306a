"""LTI in the setting that it rehearses best, on public images of its own."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from leakatlas.attacks.generative.direct.lti import LTI
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.metrics.images import psnr

EPOCHS = 20


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of the victim's image, and which setting was taken."""
    torch.set_num_threads(1)
    stage = scene.staged(cell)
    view = stage.view([stage.federation.play_round()])
    variants = {name: replace(lti, epochs=EPOCHS) for name, lti in LTI.variants().items()}
    with tempfile.TemporaryDirectory() as empty:  # nothing is taken from earlier rehearsals
        taken = rehearse(
            view, variants, view.surrogate, images=4, seed=cell.seed, cache=Path(empty)
        ).variant
    found = stage.box.denormalize(variants[taken](view, seed=cell.seed).images).clamp(0, 1)
    return {
        "psnr_rehearsed": [float(psnr(found, stage.victims[0].images))],
        "variant": [float(list(variants).index(taken))],
    }
