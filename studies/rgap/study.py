"""The ranks of a network's layers, which are known before any attack."""

from __future__ import annotations

from typing import Any

from leakatlas.attacks.analytic.closed_form.rgap import rank_analysis
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """The worst layer's rank over its unknowns."""
    ranks = rank_analysis(trial.view.model, trial.truth.images, trial.truth.labels)
    return {"least_rank_share": min(layer.rank / layer.length for layer in ranks)}
