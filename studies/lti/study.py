"""LTI in the setting that it rehearses best, on public images of its own."""

from __future__ import annotations

from dataclasses import replace

from leakatlas.attacks.generative.direct.lti import LTI
from leakatlas.audit.rehearsed import best_of
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell


def choose(cell: Cell) -> LTI:
    """Of settings that are trained equally long."""
    asked, stage = scene.attack_of(cell.case), scene.staged(cell)
    assert isinstance(asked, LTI)
    view, _ = harness.observe(stage, asked, target=0)
    variants = {n: replace(lti, epochs=asked.epochs) for n, lti in asked.variants().items()}
    best = best_of(view, variants, view.surrogate, iterations=None, seed=cell.seed).attack
    assert isinstance(best, LTI)
    return best
