"""One network a cell: rehearse once, attack every victim, and give the rivals the same CPU time.

All times are CPU seconds of one thread. Whoever rehearses pays for it: the rivals get, for every
victim, the time of our run plus the victim's part of the rehearsal.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsal import CROPS, Rehearsal, rehearse
from leakatlas.bench import rival, scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Images, OwnMeasure
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import CIFAR10, ImageSet, strangers
from leakatlas.metrics.images import psnr

# Training images from here on have trained no network.
POPULATION = Images(set="parquet:cifar10/train.parquet", first=45_000, count=200)
ITERATIONS = 150
IMAGES = 1
"""Batches of each trial of a rehearsal."""

JUDGED = 3
"""Victims on which every variant is tried, for the choice by the truth."""

Figures = dict[str, list[float]]


def measure(cell: Cell) -> Figures:
    """DB of every victim under each way to choose, and what was chosen at what cost."""
    wanted = {m.name for m in cell.case.measures if isinstance(m, OwnMeasure)}
    variants = InvertingGradients.variants()
    names, game = list(variants), Game(cell, variants)
    photos = strangers(game.victims, CROPS)
    chosen, cost = game.rehearsed(photos)
    ours, spent = game.runs(chosen.variant)
    allowed = (sum(spent) + cost) / len(ours)
    longer = round(allowed / (sum(spent) / len(spent) / ITERATIONS))
    mean = photos.images.mean((0, 2, 3), keepdim=True).expand(1, -1, 32, 32)
    found: Figures = {
        "psnr_rehearsed": ours,
        "psnr_mean_image": [float(psnr(mean, x[None])) for x in game.victims.images],
        "rehearsal_cpu_seconds": [cost],
        "run_cpu_seconds": spent,
        "iterations_at_equal_time": [float(longer)],
        "chosen": [float(names.index(chosen.variant))],
        "psnr_published": game.runs("published", length=longer)[0],
    }
    if "psnr_tuned" in wanted:
        found["psnr_tuned"] = game.runs("tuned")[0]
    if "psnr_breaching" in wanted:
        problems = [
            rival.Problem(stage=game.stage, view=view, target=i)
            for i, view in enumerate(game.views)
        ]
        found["psnr_breaching"] = [a.psnr for a in rival.ask(problems, cpu_seconds=allowed)]
    if "psnr_population" in wanted:
        own, _ = game.rehearsed(scene.images(POPULATION, cell.data))
        found["psnr_population"] = game.runs(own.variant)[0]
        found["chosen_on_population"] = [float(names.index(own.variant))]
    if "psnr_by_truth" in wanted:
        every = {name: game.runs(name, count=JUDGED)[0] for name in variants}
        best = max(every, key=lambda name: sum(every[name]))
        found["psnr_by_truth"] = every[best]
        found["chosen_by_truth"] = [float(names.index(best))]
        found["psnr_rehearsed_same_victims"] = ours[:JUDGED]
    return {name: values for name, values in found.items() if name in wanted}


class Game:
    """One network and its victims, one a client."""

    def __init__(self, cell: Cell, variants: Mapping[str, Attack]) -> None:
        self.stage, self.variants, self.seed = scene.staged(cell), variants, cell.seed
        self.victims = scene.victims(cell)
        record = self.stage.federation.play_round()
        clients = range(cell.case.clients)
        self.views = [self.stage.view([record], target=client) for client in clients]
        self._done: dict[tuple[str, int, int], tuple[float, float]] = {}

    def rehearsed(self, public: ImageSet) -> tuple[Rehearsal, float]:
        """The choice, and its CPU seconds; nothing is taken from earlier rehearsals."""
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as empty:
            found = rehearse(
                self.views[0], self.variants, public, planned=ITERATIONS, images=IMAGES,
                watch=_quiet(), seed=self.seed, cache=Path(empty),
            )  # fmt: skip
        return found, time.process_time() - begun

    def runs(
        self, name: str, *, count: int | None = None, length: int = ITERATIONS
    ) -> tuple[list[float], list[float]]:
        """DB and CPU seconds for each victim."""
        done = [self._run(name, i, length) for i in range(count or len(self.views))]
        return [quality for quality, _ in done], [seconds for _, seconds in done]

    def _run(self, name: str, victim: int, length: int) -> tuple[float, float]:
        key = (name, victim, length)
        if key not in self._done:
            begun, attack = time.process_time(), self.variants[name].lasting(length)
            found = attack(self.views[victim], seed=self.seed, watch=_quiet())
            spent = time.process_time() - begun
            self._done[key] = (self._psnr(found.images, victim), spent)
        return self._done[key]

    def _psnr(self, images: Tensor, victim: int) -> float:
        truth = self.victims.images[victim : victim + 1]
        return float(psnr(CIFAR10.denormalize(images[:1]).clamp(0, 1), truth))


def _quiet() -> Watch:
    return Watch(conduct=Conduct(execution="eager"))
