"""Around a step: schedules of the step size, transforms of the gradient, hooks after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from leakatlas.blocks.descent.objective import Variables
from leakatlas.blocks.watch import Step
from leakatlas.data import Box

Schedule = Callable[[float], float]
Transform = Callable[[Tensor], Tensor]
Hook = Callable[[Variables, Mapping[str, float], Step], None]
"""``(variables, learning rates, step)``, changes the variables in place after a step."""


def step_decay(at: Sequence[float], factor: float = 0.1) -> Schedule:
    """Multiply by ``factor`` at each of the given shares of the run."""
    return lambda progress: factor ** sum(progress >= share for share in at)


def cosine_decay(warmup: float = 0.0) -> Schedule:
    """Linear rise over the first ``warmup`` of the run, then half a cosine down to 0."""

    def schedule(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return schedule


def signed(gradient: Tensor) -> Tensor:
    """The sign: every pixel moves by the same step (through Adam, nearly so)."""
    return gradient.sign()


def inside(box: Box, name: str) -> Hook:
    """Projection of one variable, ``(..., C, H, W)`` in model space, onto the pixel box."""
    bounds: list[Tensor] = []  # made once; a step is short

    def project(variables: Variables, rates: Mapping[str, float], step: Step) -> None:
        del rates, step
        x = variables[name]
        if not bounds:
            bounds.extend(box.bounds(x))
        torch.clamp(x, min=bounds[0], max=bounds[1], out=x)

    return project


def between(low: float, high: float, name: str) -> Hook:
    """Projection of a variable that is no image (a mask, a mixing weight) onto ``[low, high]``."""

    def project(variables: Variables, rates: Mapping[str, float], step: Step) -> None:
        del rates, step
        variables[name].clamp_(low, high)

    return project


def langevin(scale: float, name: str, *, generator: torch.Generator) -> Hook:
    """Noise of standard deviation ``lr * scale`` on a variable, after the optimizer's step.

    Name its generator to :func:`~leakatlas.blocks.descent.descend`, so that a resumed run goes on
    with the same noise.
    """

    def shake(variables: Variables, rates: Mapping[str, float], step: Step) -> None:
        del step
        x = variables[name]
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        x.add_(noise, alpha=rates[name] * scale)

    return shake
