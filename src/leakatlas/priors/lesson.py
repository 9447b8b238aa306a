"""What every recipe for a prior is made of: networks, one step, numbers drawn on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

COARSEST = 8
"""Sides of generated images are multiples of it: three doublings."""


def drawn_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The square ``(C, S, S)`` of a generator whose images cover ``shape`` = ``(C, H, W)``."""
    size = -(-max(shape[1:]) // COARSEST) * COARSEST
    return shape[0], size, size


def widths(size: int, width: int = 1) -> tuple[int, ...]:
    """Feature maps of a generator's resolutions, coarse to fine; ``width`` times as many."""
    narrow = (96, 64, 48, 24) if size < 64 else (96, 64, 48, 32, 16)
    return tuple(width * maps for maps in narrow)


@dataclass(frozen=True)
class Draws:
    """Random numbers of a CPU generator, on the device that computes.

    A seed means the same on every device; page-locked memory lets a GPU go on while they travel.

    Args:
        generator: On the CPU.
        device: Where the numbers are wanted.
    """

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return self._moved(torch.randn(shape, generator=self.generator, pin_memory=self._pinned))

    def uniform(self, *shape: int) -> Tensor:
        """Of [0, 1)."""
        return self._moved(torch.rand(shape, generator=self.generator, pin_memory=self._pinned))

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers of [low, high)."""
        drawn = torch.randint(low, high, shape, generator=self.generator, pin_memory=self._pinned)
        return self._moved(drawn)

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def _moved(self, drawn: Tensor) -> Tensor:
        return drawn.to(self.device, non_blocking=True)


class Lesson(ABC):
    """What is learned, and one step of learning it.

    Attributes:
        nets: Everything with weights, for checkpoints.
        optimizers: In a fixed order, for checkpoints.
        batch: Images in a step.
        measured: What :meth:`step` returns, in words.
    """

    nets: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    batch: int
    measured: str

    @abstractmethod
    def step(self, x: Tensor, y: Tensor, draws: Draws, progress: float) -> Tensor:
        """Learn from images ``(N, C, S, S)`` of [0, 1] with labels; a figure ``()`` for people.

        Nothing in it may wait for the device: a GPU would idle at every step.
        """

    @abstractmethod
    def result(self) -> nn.Module:
        """What was learned, in eval mode."""


def average(mean: nn.Module, now: nn.Module, decay: float, progress: float) -> None:
    """Move the exponential mean of weights; while the run is young, it forgets faster."""
    share = 1 - min(decay, 0.9 + 0.1 * progress)
    with torch.no_grad():
        for kept, new in zip(mean.parameters(), now.parameters(), strict=True):
            kept.lerp_(new, share)
