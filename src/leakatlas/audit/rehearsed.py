"""Rehearsed attacks as studies measure them: from nothing, without a budget, equal bit for bit."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Reconstruction
from leakatlas.audit.rehearsal import rehearse
from leakatlas.bench import examine, harness, scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import ImageSet, strangers
from leakatlas.fl import View
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr


@dataclass(frozen=True)
class Rehearsed:
    """What served best.

    Args:
        name: Of the variant.
        number: Its place among those tried, from 0.
        attack: The variant itself, at the length of the rehearsal.
        cpu_seconds: Of the rehearsal; next to none where this process made the same one before.
    """

    name: str
    number: int
    attack: Attack
    cpu_seconds: float


def quiet() -> Watch:
    """No budget, and slopes computed in the one way that repeats bit for bit."""
    return Watch(conduct=Conduct(execution="eager"))


@functools.cache
def _own_folder() -> Path:
    """Of this process: the next victim of a state asks for the very same rehearsal."""
    folder = Path(tempfile.mkdtemp(prefix="leakatlas-rehearsals-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def best_of(
    view: View, variants: Mapping[str, Attack], public: ImageSet, *, iterations: int | None,
    seed: int,
) -> Rehearsed:  # fmt: skip
    """The variant that rebuilds the adversary's own images best, each tried on one batch.

    Args:
        view: Whose model and protocol it rehearses on.
        variants: What is tried, by name.
        public: The adversary's images.
        iterations: Of the run that is planned, if it has any.
        seed: As in that run.
    """
    begun = time.process_time()
    name = rehearse(
        view, variants, public, planned=iterations, images=1, watch=quiet(), seed=seed,
        cache=_own_folder() / str(iterations),
    ).variant  # fmt: skip
    spent, chosen = time.process_time() - begun, variants[name]
    if iterations is not None:
        chosen = chosen.lasting(iterations)
    return Rehearsed(name, list(variants).index(name), chosen, spent)


def rehearsed(cell: Cell) -> Attack:
    """What a case with the preset ``rehearsed`` runs; ``choose`` of a study's own file.

    It rehearses on photos of strangers, at the length of its run; what that costs is no part of the
    cell's time.

    Args:
        cell: Whose case names an attack and its length.
    """
    asked, stage = scene.attack_of(cell.case), scene.staged(cell)
    view, _ = harness.observe(stage, asked, target=cell.case.target)
    public = strangers(stage.victims[cell.case.target])
    return best_of(
        view, asked.variants(), public, iterations=asked.length, seed=cell.seed
    ).attack  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """One attack on every victim.

    Args:
        psnr: DB of every image, client by client.
        cpu_seconds: Of every client.
        found: What came back of every client.
    """

    psnr: list[float]
    cpu_seconds: list[float]
    found: list[Reconstruction]


class Contest:
    """One network and its clients, all of them victims of one round.

    Args:
        cell: The set-up.
    """

    def __init__(self, cell: Cell) -> None:
        self.stage, self.seed = scene.staged(cell), cell.seed
        record = self.stage.federation.play_round()
        self.clients = sorted(self.stage.victims)
        self.views = [self.stage.view([record], target=client) for client in self.clients]

    def rehearsed(
        self, variants: Mapping[str, Attack], public: ImageSet, *, iterations: int
    ) -> Rehearsed:
        """The variant that rebuilds the adversary's own images best, each tried on one batch.

        Args:
            variants: What is tried, by name.
            public: The adversary's images.
            iterations: Of the run that is planned.
        """
        view, seed = self.views[0], self.seed
        return best_of(view, variants, public, iterations=iterations, seed=seed)

    def runs(self, attack: Attack, *, without: str | None = None, count: int | None = None) -> Runs:
        """Attack every client; an image without a candidate counts as the mean public image.

        Args:
            attack: Who attacks.
            without: A fact of the view that it does not have.
            count: Only the first clients.
        """
        runs = Runs([], [], [])
        for client, view in list(zip(self.clients, self.views, strict=True))[:count]:
            begun = time.process_time()
            held = view if without is None else view.without(without)
            made = attack(held, seed=self.seed, watch=quiet())
            runs.cpu_seconds.append(time.process_time() - begun)
            images = self.stage.box.denormalize(made.images)
            truth = self.stage.victims[client].images
            null = _held_against(mean_image(scene.public_images(self.stage)[0]), truth)
            runs.psnr.extend(examine.reached(images, truth, null=null))
            runs.found.append(made)
        return runs

    def constant(self, image: Tensor) -> list[float]:
        """DB of one image ``(C, H, W)`` held against every victim's."""
        truths = torch.cat([self.stage.victims[client].images for client in self.clients])
        return _held_against(image, truths)


def _held_against(image: Tensor, truths: Tensor) -> list[float]:
    return [float(value) for value in psnr(image.expand_as(truths).to(truths), truths)]
