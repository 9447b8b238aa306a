"""One network a cell: rehearse once, attack every victim, and give the rivals the same CPU time.

All times are CPU seconds of one thread. Whoever rehearses pays for it: the rivals get, for every
victim, the time of our run plus the victim's part of the rehearsal.
"""

from __future__ import annotations

from collections.abc import Mapping

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.games import CROPS
from leakatlas.audit.rehearsed import Contest, Runs
from leakatlas.bench import rival, scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Images, OwnMeasure
from leakatlas.data import strangers

# Training images from here on have trained no network.
POPULATION = Images(set="parquet:cifar10/train.parquet", first=45_000, count=200)
ITERATIONS = 150
JUDGED = 3
"""Victims on which every variant is tried, for the choice by the truth."""

Figures = dict[str, list[float]]


def measure(cell: Cell) -> Figures:
    """DB of every victim under each way to choose, and what was chosen at what cost."""
    wanted = {m.name for m in cell.case.measures if isinstance(m, OwnMeasure)}
    variants = InvertingGradients.variants()
    names, game = list(variants), Game(cell, variants)
    photos = strangers(scene.victims(cell), CROPS)
    chosen = game.rehearsed(variants, photos, iterations=ITERATIONS)
    ours, spent = game.of(chosen.name).psnr, game.of(chosen.name).cpu_seconds
    allowed = (sum(spent) + chosen.cpu_seconds) / len(ours)
    longer = round(allowed / (sum(spent) / len(spent) / ITERATIONS))
    found: Figures = {
        "psnr_rehearsed": ours,
        "psnr_mean_image": game.constant(photos.images.mean((0, 2, 3))[:, None, None]),
        "rehearsal_cpu_seconds": [chosen.cpu_seconds],
        "run_cpu_seconds": spent,
        "iterations_at_equal_time": [float(longer)],
        "chosen": [float(chosen.number)],
        "psnr_published": game.of("published", length=longer).psnr,
    }
    if "psnr_tuned" in wanted:
        found["psnr_tuned"] = game.of("tuned").psnr
    if "psnr_breaching" in wanted:
        problems = [
            rival.Problem(stage=game.stage, view=view, target=i)
            for i, view in enumerate(game.views)
        ]
        found["psnr_breaching"] = [a.psnr for a in rival.ask(problems, cpu_seconds=allowed)]
    if "psnr_population" in wanted:
        public = scene.images(POPULATION, cell.data)
        own = game.rehearsed(variants, public, iterations=ITERATIONS)
        found["psnr_population"] = game.of(own.name).psnr
        found["chosen_on_population"] = [float(own.number)]
    if "psnr_by_truth" in wanted:
        every = {name: game.of(name, count=JUDGED).psnr for name in variants}
        best = max(every, key=lambda name: sum(every[name]))
        found["psnr_by_truth"] = every[best]
        found["chosen_by_truth"] = [float(names.index(best))]
        found["psnr_rehearsed_same_victims"] = ours[:JUDGED]
    return {name: values for name, values in found.items() if name in wanted}


class Game(Contest):
    """One network and its victims; a variant runs once for a length."""

    def __init__(self, cell: Cell, variants: Mapping[str, Attack]) -> None:
        super().__init__(cell)
        self.variants = variants
        self._done: dict[tuple[str, int | None, int], Runs] = {}

    def of(self, name: str, *, count: int | None = None, length: int = ITERATIONS) -> Runs:
        """What a variant reaches."""
        key = (name, count, length)
        if key not in self._done:
            self._done[key] = self.runs(self.variants[name].lasting(length), count=count)
        return self._done[key]
