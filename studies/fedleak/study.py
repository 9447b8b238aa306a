"""Rehearsed attacks, which no recipe names beforehand, and the PSNR that all cases share."""

from __future__ import annotations

from typing import Any

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.fedleak import FedLeak
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsed import Contest
from leakatlas.bench.cells import Cell
from leakatlas.bench.harness import Trial
from leakatlas.bench.looks import Look
from leakatlas.data import strangers
from leakatlas.fl import Stage

ITERATIONS = 100
ATTACKS: dict[str, type[Attack]] = {
    "chosen_fedleak": FedLeak, "chosen_inverting_gradients": InvertingGradients
}  # fmt: skip


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """PSNR of every image under the best assignment."""
    return {"quality": Look.psnr(trial, stage)}


def measure(cell: Cell) -> dict[str, Any]:
    """The same for what rehearsed best, at the same length; else for the mean image."""
    contest = Contest(cell)
    names = {m if isinstance(m, str) else m.name for m in cell.case.measures}
    asked = next((name for name in ATTACKS if name in names), None)
    if asked is None:
        assert contest.stage.surrogate is not None
        return {"quality": contest.constant(contest.stage.surrogate.images.mean(0))}
    public = strangers(contest.stage.victims[0])
    best = contest.rehearsed(ATTACKS[asked].variants(), public, iterations=ITERATIONS)
    return {"quality": contest.runs(best.attack).psnr, asked: [float(best.number)]}
