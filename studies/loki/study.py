"""Held against the bins that the true brightness falls into, client by client."""

from __future__ import annotations

from typing import Any

from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """Which images are alone in their bin, and which of them came back exactly."""
    return look.in_bins(trial, stage.scenario.clients)
