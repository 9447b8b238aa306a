"""Whole batches, and the sets of rows that they took beside the expected number."""

from __future__ import annotations

from typing import Any

from leakatlas.attacks.analytic.closed_form.spear import expected_samples
from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """A batch counts if every image is exact and SPEAR says so."""
    exact = bool(look.exact(trial).all())
    certified = trial.found.status == "complete"
    drawn = trial.found.notes.get("samples")
    expected = expected_samples(len(trial.truth.images))
    return {
        "whole": float(exact and certified),
        "certified_but_wrong": float(certified and not exact),
        "drawn_over_theory": [] if drawn is None else [float(drawn) / expected],
    }
