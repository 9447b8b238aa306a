"""Untrained priors, small and with outputs that fill the pixel range: they need no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from leakatlas.attacks.generative.latent import gifd
from leakatlas.bench import harness
from leakatlas.blocks.descent import Hook, Variables
from leakatlas.blocks.watch import Step
from leakatlas.data import ImageSet
from leakatlas.models import Card, Generator
from leakatlas.priors import Prior, kept
from leakatlas.priors.prior import through
from leakatlas.threat import Grant
from tests.conftest import build_stage

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
    return Prior(G, CARD, (G.latent,), shape, G.classes, kept.opened(G))


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


def check_stages(found: Prior, z: Tensor, y: Tensor | None = None) -> None:
    """The stages make the network, and a slope reaches the feature that each of them takes."""
    assert len(found.stages) > 1
    state = found.inputs(z, y)
    assert torch.allclose(through(found.stages, *state), found.decoder(y)(z), atol=1e-6)
    for k, stage in enumerate(found.stages):
        h, beside = state[0].detach().requires_grad_(), state[1:]
        image = through(found.stages[k:], h, *beside)
        (slope,) = torch.autograd.grad(image.square().sum(), h)
        assert bool((slope.flatten(1).norm(dim=1) > 0).all()), f"stage {k}"
        state = stage(h, *beside)
    assert len(state) == 1 and state[0].shape == (len(z), *found.shape)


def check_search(
    found: Prior, patch: pytest.MonkeyPatch, y: int = 0, *, falls: float = 0.5
) -> None:
    """GIFD opens every stage: what only a middle stage draws it reaches by features alone.

    ``falls`` is the share of the loss that may be left.
    """
    patch.setattr(kept, "decoder", lambda name: found)
    draws = torch.Generator().manual_seed(3)
    label = torch.tensor([y])
    state = found.inputs(torch.randn(1, *found.latent, generator=draws), label)
    middle = len(found.stages) // 2
    with torch.no_grad():
        for stage in found.stages[:middle]:
            state = stage(*state)
        h, *beside = state
        h = h + h.std() * torch.randn(h.shape, generator=draws)
        pixels = through(found.stages[middle:], h, *beside).clamp(0, 1)
    count = found.classes or 10
    settings, names = {"width": 8, "classes": count}, tuple(map(str, range(count)))
    scene = build_stage(
        model="convnet", settings=settings, size=found.shape[1], letter="D", examples=1,
        dtype=torch.float32, grants=frozenset({Grant.LABELS}),
        victims=ImageSet(pixels, label, name="out of range", classes=names),
    )  # fmt: skip
    attack = gifd.GIFD(steps=40, restarts=1, prior="held", radius=math.inf, tv_weight=0.0)
    view, _ = harness.observe(scene, attack)
    opened, closed = attack(view), replace(attack, stages=0)(view)

    def psnr(images: Tensor) -> float:
        return float(-10 * (scene.box.denormalize(images) - pixels).square().mean().log10())

    losses = [opened.notes[f"stage_{k}_loss"] for k in range(len(found.stages))]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < falls * losses[0] and psnr(opened.images) > psnr(closed.images) + 0.5

    inside: list[float] = []
    in_ball = gifd.in_ball

    def told(center: Tensor, radii: Tensor) -> Hook:
        hook = in_ball(center, radii)

        def project(variables: Variables, rates: Mapping[str, float], step: Step) -> None:
            hook(variables, rates, step)
            size = (variables["h"] - center).flatten(1).abs().sum(1)
            inside.append(float((size / radii).max()))

        return project

    patch.setattr(gifd, "in_ball", told)
    bound = replace(attack, radius=0.05, steps=10)(view)
    assert len(inside) == 10 * (len(found.stages) - 1)
    assert 0.5 < max(inside) < 1 + 1e-4
    assert bound.notes["matching_loss"] > opened.notes["matching_loss"]
