"""Both adversaries as they rehearse, LTI on public images of its own."""

from __future__ import annotations

from leakatlas.attacks.api import Attack
from leakatlas.attacks.generative.direct.lti import LTI
from leakatlas.audit.rehearsed import best_of, rehearsed
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell


def choose(cell: Cell) -> Attack:
    """Of settings that are trained, or searched, equally long."""
    asked = scene.attack_of(cell.case)
    if not isinstance(asked, LTI):
        return rehearsed(cell)
    view, _ = harness.observe(scene.staged(cell), asked, target=0)
    return best_of(
        view, asked.variants(), view.surrogate, iterations=asked.length, seed=cell.seed
    ).attack  # fmt: skip
