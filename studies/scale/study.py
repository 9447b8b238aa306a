"""Speed and memory of a read-out at full size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.analytic.isolation.loki import LOKI
from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.bench import meter
from leakatlas.bench.harness import Trial
from leakatlas.blocks import readout
from leakatlas.fl import Stage, View

MIB = 2**20
ReadOut = RobbingTheFed | LOKI


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """What reading the update cost."""
    assert trial.found.recipe is not None
    told = trial.found.recipe.attack["parameters"]
    loki = trial.found.recipe.attack["key"] == LOKI.key
    return costs(trial.view, LOKI.from_json(told) if loki else RobbingTheFed.from_json(told))


def costs(view: View, attack: ReadOut) -> dict[str, float]:
    """Of the whole read-out, and of the block in it that reads the weights."""
    g_w, g_b = (view.update.tensors[f"block.first.{part}"] for part in ("weight", "bias"))
    edges = view.rounds[-1].key["edges"]

    def block() -> Tensor:
        if isinstance(attack, LOKI):
            blocks = attack.blocks(view, -1, view.input_shape)
            read = [attack.read_block(b, edges, view.input_shape)[0] for b in blocks]
            return torch.cat([images.flatten(1) for images in read])
        return readout.cumulative_readout(g_w, g_b, edges[:-1]).x

    images, x = len(attack(view).images), block()
    # Least traffic: what every candidate is made of is read once, and the candidate written.
    rows = len(x) if isinstance(attack, LOKI) else 2 * len(x)
    moved = (rows * x.shape[1] + x.numel()) * x.element_size() / meter.least(block) / 1e9
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / meter.least(lambda: target.copy_(source)) / 1e9
    part, whole = meter.allocated(block), meter.allocated(lambda: attack(view))
    return {
        "images_per_second": images / meter.least(lambda: attack(view)),
        "moved": moved,
        "copied": copied,
        "moved_over_copied": moved / copied,
        "weight": g_w.nbytes / MIB,
        "block_allocates": part.total / g_w.nbytes,
        "block_at_once": part.most / g_w.nbytes,
        "whole_allocates": whole.total / g_w.nbytes,
        "whole_at_once": whole.most / g_w.nbytes,
    }
