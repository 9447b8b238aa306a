"""What an adversary of a study takes after a rehearsal; ``choose`` of a study's own file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from leakatlas.attacks.api import Attack
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import strangers


def rehearsed(cell: Cell) -> Attack:
    """The variant that rebuilt the adversary's own images best, as long as the case's attack.

    Every cell rehearses anew, on photos of strangers, at the length of its run; what that costs is
    no part of the cell's time.

    Args:
        cell: Whose case names an attack and its length, with the preset ``rehearsed``.
    """
    asked = scene.attack_of(cell.case)
    stage = scene.staged(cell)
    view, _ = harness.observe(stage, asked, target=cell.case.target)
    variants = asked.variants()
    with tempfile.TemporaryDirectory() as empty:  # nothing is taken from earlier rehearsals
        best = rehearse(
            view, variants, strangers(stage.victims[cell.case.target]), planned=asked.length,
            images=1, watch=Watch(conduct=Conduct(execution="eager")), seed=cell.seed,
            cache=Path(empty),
        ).variant  # fmt: skip
    return variants[best] if asked.length is None else variants[best].lasting(asked.length)
