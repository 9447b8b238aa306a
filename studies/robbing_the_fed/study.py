"""Held against the bins that the true measurements fall into."""

from __future__ import annotations

from typing import Any

from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.blocks import readout
from leakatlas.fl import Stage


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """Singleton bins, what theory expects of them, and which came back exactly."""
    key, exact = trial.view.key, look.exact(trial)
    images = trial.truth.images.flatten(1).to(key["w"])
    single = look.alone(images @ key["w"], key["edges"])
    return {
        "singletons": float(single.sum()),
        "expected_singletons": readout.expected_singletons(len(images), len(key["edges"]) - 1),
        "exact_of_singletons": look.share(exact[single]),
        "any_exact": float(exact.any()),
    }
