"""One network a cell: rehearse once, attack every victim, and give the rivals the same CPU time.

All times are CPU seconds of one thread. Whoever rehearses pays for it: the rivals get, for every
victim, the time of our run plus the victim's part of the rehearsal. breaching (0.1.2, extra
``bench``) runs in a Python of its own, which ``$LEAKATLAS_RIVAL`` names.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import models
from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit import strangers
from leakatlas.audit.rehearsal import Rehearsal, rehearse
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Images
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import CIFAR10, ImageSet
from leakatlas.errors import Unavailable
from leakatlas.fl import FedSGD, ModelRef, Scenario, stage
from leakatlas.metrics.images import psnr
from leakatlas.threat import Grant

HERE = Path(__file__).parent
RIVAL = HERE.parents[1] / "benchmarks" / "rival.py"
POPULATION = "parquet:cifar10/train.parquet"
FIRST_UNSEEN = 45_000
"""Training images from here on have trained no network."""

ITERATIONS = 150
IMAGES = 1
"""Batches of each trial of a rehearsal."""

JUDGED = 3
"""Victims on which every variant is tried, for the choice by the truth."""


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of every victim under each way to choose, and what was chosen at what cost."""
    torch.set_num_threads(1)
    wanted = {m if isinstance(m, str) else m.name for m in cell.case.measures}
    victims = scene.images(cell.case.victims, cell.data)
    reference, model = network(cell)
    variants = InvertingGradients.variants()
    game = Game(reference, model, victims, cell.seed)
    chosen, cost = game.rehearsed(variants, strangers.photos_like(victims))
    ours, spent = game.runs(chosen.variant, variants)
    allowed = (sum(spent) + cost) / len(victims)
    pace = sum(spent) / len(spent) / ITERATIONS
    longer = round(allowed / pace)
    found = {
        "psnr_rehearsed": ours,
        "psnr_mean_image": game.constant(),
        "rehearsal_cpu_seconds": [cost],
        "run_cpu_seconds": spent,
        "iterations_at_equal_time": [float(longer)],
        "chosen": [float(list(variants).index(chosen.variant))],
        "psnr_published": game.at("published", variants, longer),
    }
    if "psnr_tuned" in wanted:
        found["psnr_tuned"] = game.runs("tuned", variants)[0]
    if "psnr_breaching" in wanted:
        found["psnr_breaching"] = game.rival(allowed)
    if "psnr_population" in wanted:
        public = scene.images(population(), cell.data)
        own, _ = game.rehearsed(variants, public)
        found["psnr_population"] = game.runs(own.variant, variants)[0]
        found["chosen_on_population"] = [float(list(variants).index(own.variant))]
    if "psnr_by_truth" in wanted:
        every = {name: game.runs(name, variants, JUDGED)[0] for name in variants}
        best = max(every, key=lambda name: sum(every[name]))
        found["psnr_by_truth"] = every[best]
        found["chosen_by_truth"] = [float(list(variants).index(best))]
        found["psnr_rehearsed_same_victims"] = ours[:JUDGED]
    return {name: values for name, values in found.items() if name in wanted}


def population() -> Images:
    """Photos of the victims' population that trained no network."""
    return Images(set=POPULATION, first=FIRST_UNSEEN, count=200)


def network(cell: Cell) -> tuple[ModelRef, nn.Module]:
    """The network of a case: the shipped or fresh one, or that of this folder."""
    own = HERE / "weights" / f"{cell.case.model.builtin}-cifar10.safetensors"
    reference, model = scene.network(cell)
    if own.is_file() and cell.case.model.weights is None:
        model.load_state_dict(models.load_state(own))
    return reference, model


class Game:
    """One network and its victims.

    Args:
        reference: How the network is named.
        model: The network.
        victims: One client each.
        seed: Of everything.
    """

    def __init__(self, reference: ModelRef, model: nn.Module, victims: ImageSet, seed: int) -> None:
        self.model, self.victims, self.seed = model, victims, seed
        scenario = Scenario(
            model=reference, clients=len(victims), protocol=FedSGD(), letter="B",
            grants=frozenset({Grant.LABELS}), seed=seed,
        )  # fmt: skip
        self.stage = stage(scenario, model=model, victims=victims, box=CIFAR10)
        record = self.stage.federation.play_round()
        self.views = [self.stage.view([record], target=i) for i in range(len(victims))]
        self._done: dict[tuple[str, int, int], tuple[float, float]] = {}

    def rehearsed(
        self, variants: Mapping[str, Attack], public: ImageSet
    ) -> tuple[Rehearsal, float]:
        """The choice, and its CPU seconds; nothing is taken from earlier rehearsals."""
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as empty:
            quiet = Watch(conduct=Conduct(execution="eager"))
            found = rehearse(
                self.views[0], variants, public, planned=ITERATIONS, images=IMAGES,
                watch=quiet, seed=self.seed, cache=Path(empty),
            )  # fmt: skip
        return found, time.process_time() - begun

    def runs(
        self, name: str, variants: Mapping[str, Attack], count: int | None = None
    ) -> tuple[list[float], list[float]]:
        """DB and CPU seconds for each victim, at the planned length."""
        done = [
            self._run(name, variants[name], i, ITERATIONS)
            for i in range(count or len(self.victims))
        ]
        return [quality for quality, _ in done], [seconds for _, seconds in done]

    def at(self, name: str, variants: Mapping[str, Attack], iterations: int) -> list[float]:
        """DB for each victim at another length."""
        return [self._run(name, variants[name], i, iterations)[0] for i in range(len(self.victims))]

    def _run(self, name: str, attack: Attack, victim: int, length: int) -> tuple[float, float]:
        key = (name, victim, length)
        if key not in self._done:
            begun = time.process_time()
            watch = Watch(conduct=Conduct(execution="eager"))
            found = attack.lasting(length)(self.views[victim], seed=self.seed, watch=watch)
            spent = time.process_time() - begun
            self._done[key] = (self._psnr(found.images, victim), spent)
        return self._done[key]

    def _psnr(self, images: Tensor, victim: int) -> float:
        truth = self.victims.images[victim : victim + 1]
        return float(psnr(CIFAR10.denormalize(images[:1]).clamp(0, 1), truth))

    def constant(self) -> list[float]:
        """DB of the mean image of strangers."""
        mean = strangers.photos_like(self.victims).images.mean((0, 2, 3), keepdim=True)
        return [float(psnr(mean.expand(1, -1, 32, 32), x[None])) for x in self.victims.images]

    def rival(self, allowed: float) -> list[float]:
        """DB of breaching for each victim, with as many iterations as take the same CPU time."""
        python = os.environ.get("LEAKATLAS_RIVAL")
        if python is None:
            raise Unavailable(
                "breaching runs in a Python of its own: install the extra 'bench' into one and "
                "name it in $LEAKATLAS_RIVAL."
            )
        reference = self.stage.scenario.model
        with tempfile.TemporaryDirectory() as folder:
            jobs = []
            for victim, view in enumerate(self.views):
                tensors = {
                    "x": CIFAR10.normalize(self.victims.images[victim : victim + 1]),
                    "y": self.victims.labels[victim : victim + 1],
                    **{f"parameter/{n}": p.detach() for n, p in self.model.named_parameters()},
                    **{f"buffer/{n}": b for n, b in self.model.named_buffers()},
                    **{f"update/{n}": t for n, t in view.update.tensors.items()},
                }
                file = Path(folder) / f"{victim}.safetensors"
                save_file({n: t.clone().contiguous() for n, t in tensors.items()}, file)
                jobs.append({
                    "case": reference.name, "batch": 1, "restarts": 1, "steps": 0,
                    "seed": self.seed, "tensors": str(file), "mean": list(CIFAR10.mean),
                    "std": list(CIFAR10.std),
                    "model": {"name": reference.name, "kwargs": dict(reference.kwargs)},
                })  # fmt: skip
            asked, out = Path(folder) / "jobs.json", Path(folder) / "out.json"
            asked.write_text(json.dumps({"allowed": allowed, "jobs": jobs}), encoding="utf-8")
            done = subprocess.run(
                [python, str(HERE / "rival.py"), str(RIVAL.parent), str(asked), str(out)],
                capture_output=True, text=True, cwd=folder,
            )  # fmt: skip
            if done.returncode:
                raise Unavailable(f"breaching failed in {python}: {done.stderr[-400:]}")
            answer: list[float] = json.loads(out.read_text(encoding="utf-8"))
        return answer
