"""Whether agreement of two rows tells exact images, without any truth."""

from __future__ import annotations

from typing import Any

from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage
from leakatlas.metrics.assignment import pairwise_mse


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """Whether every candidate in which two rows agree is exact."""
    x, confidence = trial.truth.images, trial.found.confidence
    if confidence is None or not len(trial.images):
        return {"agreeing_exact": []}
    nearest = pairwise_mse(trial.images.double(), x.double()).min(dim=1).values.sqrt()
    exact = nearest[confidence >= 2] < look.EXACT[trial.images.dtype]
    return {"agreeing_exact": look.share(exact)}
