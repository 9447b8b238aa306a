"""Which examples are alone in a row, by the true activations, tampered and untouched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage
from leakatlas.metrics.assignment import pairwise_mse


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """Recall and precision of both networks, and whether agreement of rows tells exact images."""
    x = trial.truth.images
    # Behind an inserted block the view has no model to build: its rows are in no first layer.
    inserted = int(trial.view.key["layer"]) < 0
    recall, precision = ([], []) if inserted else _rates(trial.view.model, x)
    before = _rates(stage.federation.model, x)
    agreed: list[float] = []
    confidence = trial.found.confidence
    if confidence is not None and len(trial.images):
        nearest = pairwise_mse(trial.images.double(), x.double()).min(dim=1).values.sqrt()
        agreed = look.share(nearest[confidence >= 2] < look.EXACT[trial.images.dtype])
    return {
        "recall": recall,
        "precision": precision,
        "passive_recall": before[0],
        "passive_precision": before[1],
        "agreeing_exact": agreed,
    }


def _rates(model: nn.Module, images: torch.Tensor) -> tuple[list[float], list[float]]:
    """Alone in a row, for every example; and the share of firing rows with one example.

    Empty where the first linear layer does not see the pixels.
    """
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    flat = images.flatten(1).to(layer.weight)
    if layer.in_features != flat.shape[1]:
        return [], []
    with torch.no_grad():
        fires = layer(flat) > 0
    count = fires.sum(dim=0)
    alone = (fires & (count == 1)).any(dim=1)
    return look.share(alone), [float((count == 1).sum() / (count > 0).sum().clamp(min=1))]
