"""Untrained priors, small and with outputs that fill the pixel range: they need no checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from leakatlas.models import Card, Generator
from leakatlas.priors import Prior, kept

SIZE = 16

CARD = Card(
    name="held", model="generator", settings={}, box=None, data="none", split="none", recipe="",
    seed=0, epochs=0, figures={}, date="2026-11-26", license="Apache-2.0", sha256="",
)  # fmt: skip


def generator(seed: int = 0, *, size: int = SIZE, classes: int = 0) -> Generator:
    """A generator whose images differ visibly, in eval mode and frozen."""
    G = Generator(latent=12, size=size, widths=(24, 16, 12), classes=classes, seed=seed)
    with torch.no_grad():
        last = G.stages[-1]
        assert isinstance(last, torch.nn.Sequential)
        last[0].weight.mul_(4)  # type: ignore[operator]  # a convolution's weight
    return G.eval().requires_grad_(False)


def prior(G: Generator) -> Prior:
    """A generator as a prior."""
    shape = (G.channels, G.size, G.size)
    return Prior(G, CARD, (G.latent,), shape, G.classes, tuple(G.stages))


def held(G: Generator, patch: pytest.MonkeyPatch) -> None:
    """Let attacks find the generator under any name."""
    patch.setattr(kept, "decoder", lambda name: prior(G))


ABOUT = {"schema": "leakatlas/prior/1", "data": "nothing", "license": "MIT"}
"""What every recipe of a prior of others says."""


def written(folder: Path, state: dict[str, Tensor], **recipe: object) -> Path:
    """A folder with weights and the recipe of a prior."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {n: t.clone().contiguous() for n, t in state.items()}, folder / "weights.safetensors"
    )
    text = yaml.safe_dump({**ABOUT, "weights": "weights.safetensors", **recipe})
    (folder / "prior.yaml").write_text(text)
    return folder
