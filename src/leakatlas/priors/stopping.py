"""When a generator that learns against a critic has learned enough: its loss does not tell.

What tells is how close it can draw images that it has not seen: the inversion PSNR, which bounds
every search among its pictures. It is looked at some twenty times on images held out for this
alone, by a short search; the best weights are kept, and training ends when no look is better any
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

LOOKS = 20
"""Looks in a training."""
APART = 100
"""Steps between two of them, at the least: one takes as long as ten or twenty steps."""
PATIENCE = 5
"""Looks without a better one after which training ends."""
LOOKED_AT = 32
"""Images of a look, at most."""
SEARCH_STEPS, SEARCH_LR = 50, 0.1
"""The search for their latents: by Adam from 0."""


@dataclass
class Stopping:
    """The best weights so far, and how the figure went.

    Args:
        figure: PSNR in dB of a network in eval mode; draws no random numbers.
        patience: Looks without a better one after which training ends.
        apart: Steps between two looks, at the least.
        curve: The looks, each with the step that it followed.
        weights: Of the best of them.
    """

    figure: Callable[[nn.Module], float]
    patience: int = PATIENCE
    apart: int = APART
    curve: list[tuple[int, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    _mark: int = 0

    def due(self, made: int, progress: float) -> bool:
        """Whether to look after so many steps; ``progress`` is that of the schedule, in [0, 1]."""
        mark = int(LOOKS * progress)
        if mark <= self._mark or made - (self.curve[-1][0] if self.curve else 0) < self.apart:
            return False
        self._mark = mark
        return True

    def look(self, made: int, network: nn.Module) -> None:
        """Measure the network after so many steps, and keep its weights if they are the best."""
        found = self.figure(network)
        found = found if math.isfinite(found) else -math.inf  # it has broken down
        if not self.curve or found > max(value for _, value in self.curve):
            self.weights = {n: t.detach().cpu().clone() for n, t in network.state_dict().items()}
        self.curve.append((made, found))

    @property
    def best(self) -> tuple[int, float]:
        """The step of the best look, the first of equals, and its figure."""
        return max(self.curve, key=lambda look: look[1])

    @property
    def over(self) -> bool:
        """Whether training has gone on long enough without a better one."""
        return bool(self.curve) and self._since() >= self.patience

    def _since(self) -> int:
        return len(self.curve) - 1 - self.curve.index(self.best)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"curve": self.curve, "weights": self.weights, "mark": self._mark}

    def resume(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.curve = [(int(step), float(value)) for step, value in state["curve"]]
        self.weights, self._mark = dict(state["weights"]), int(state["mark"])
