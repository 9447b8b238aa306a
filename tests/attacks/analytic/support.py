"""What the tests of the analytic attacks share: small stages in float64, and exact hits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.bench.harness import Trial
from leakatlas.data import Box, ImageSet, bundled
from leakatlas.fl import Defense, FedSGD, ModelRef, Protocol, Scenario, Stage, View, stage
from leakatlas.threat import Vantage

UNIT = Box.unit(3)
EXACT = "donot_use_mm_for_euclid_dist"  # the matrix-product form gives a copy an error of 1e-8


@functools.cache
def crops(size: int, count: int, part: str = "victim") -> ImageSet:
    """Crops of the bundled photos; the victims' have 8 classes."""
    return bundled.patches(size, count, part=part)


def small_stage(
    *,
    letter: str,
    model: str = "convnet",
    settings: Mapping[str, Any] | None = None,
    live: torch.nn.Module | None = None,
    size: int = 16,
    examples: int = 1,
    clients: int = 1,
    protocol: Protocol | None = None,
    vantage: Vantage = Vantage.SERVER,
    defenses: tuple[Defense, ...] = (),
    box: Box = UNIT,
    victims: ImageSet | None = None,
    dtype: torch.dtype = torch.float64,
) -> Stage:
    """A stage on crops of photos, with other photos as the surrogate set."""
    extra = {"width": 4} if model == "convnet" and settings is None else dict(settings or {})
    reference = ModelRef("builtin", model, {"size": size, "classes": 10, **extra})
    scenario = Scenario(
        model=reference,
        letter=letter,
        examples=examples,
        clients=clients,
        protocol=protocol or FedSGD(),
        vantage=vantage,
        defenses=defenses,
    )
    return stage(
        scenario,
        model=(live if live is not None else reference.build()).to(dtype),
        victims=victims if victims is not None else crops(size, examples * clients),
        surrogate=crops(size, 256, "surrogate"),
        box=box,
    )


def errors(trial: Trial) -> Tensor:
    """Root mean square distance of every private image to its nearest candidate, ``(N,)``."""
    truth = trial.truth.images.double().flatten(1)
    if len(trial.images) == 0:
        return torch.full((len(truth),), torch.inf)
    candidates = trial.images.double().flatten(1)
    nearest: Tensor = (
        torch.cdist(truth, candidates, compute_mode=EXACT).min(dim=1).values / truth.shape[1] ** 0.5
    )
    return nearest


def psnr(trial: Trial) -> Tensor:
    """Of every private image against its nearest candidate, in dB, ``(N,)``."""
    return -20 * errors(trial).clamp(min=1e-15).log10()


def same_after_saving(attack: Attack, view: View, folder: Path, **load: Any) -> None:
    """A view from disk gives the same candidates, bit for bit."""
    view.save(folder)
    here, there = attack(view), attack(View.load(folder, **load))
    assert here.status == there.status and here.reason == there.reason
    assert torch.equal(here.images, there.images)
    assert (here.confidence is None) == (there.confidence is None)
    if here.confidence is not None and there.confidence is not None:
        assert torch.equal(here.confidence, there.confidence)
    assert dict(here.notes) == dict(there.notes)


def alone_in_bin(h: Tensor, edges: Tensor) -> Tensor:
    """Which measurements ``(N,)`` have a bin of ``edges`` to themselves."""
    bins = torch.bucketize(h, edges)
    return torch.tensor([int((bins == b).sum()) == 1 for b in bins])


def extremes(clients: int, examples: int, tone: str, size: int = 16) -> ImageSet:
    """Crops of which every client's first is darker, or brighter, than any public image."""
    held = crops(size, clients * examples)
    images = held.images.clone()
    share, base = (0.02, 0.0) if tone == "dark" else (0.2, 0.8)
    images[::examples] = images[::examples] * share + base
    return replace(held, images=images)


def outermost(trial: Trial, tone: str) -> Tensor:
    """Which private images ``(N,)`` fall into the first bin, or the last."""
    edges = trial.view.key["edges"]
    h = trial.truth.images.double().flatten(1).mean(dim=1)
    return h < edges[1] if tone == "dark" else h > edges[-2]


def likeness(trial: Trial) -> Tensor:
    """Cosine of every private image with its most similar candidate, pixels in [0, 1], ``(N,)``."""
    if len(trial.images) == 0:
        return torch.zeros(len(trial.truth.images), dtype=torch.float64)
    truth, found = (
        torch.nn.functional.normalize(x.double().flatten(1))
        for x in (trial.truth.images, trial.images)
    )
    best: Tensor = (truth @ found.T).max(dim=1).values
    return best
