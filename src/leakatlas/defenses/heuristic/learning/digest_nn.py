r"""DigestNN, digestive neural networks (Lee et al., Computers & Security 2021).

Every client has a private network D from images to images and trains the shared classifier f on
:math:`x' = D(x)` alone; D never leaves it. D itself learns

.. math:: \min_D \; \ell(f(D(x)), y) + \beta \max\bigl(0, \, d - \tfrac 1{CHW}
          \lVert D(x) - x \rVert^2 \bigr),

so that its images serve f and stay away from the true ones. At prediction inputs pass D as well.

What an adversary does about it: an attack on f finds :math:`x'`, as well as it finds an undefended
image. What is left is whether D can be undone; it is smooth and near to what f can read, so that
pairs of a surrogate may teach an inverse. Whoever knows D searches through it.

Departures (rebuilt from the abstract; the details are ours):
    * D adds two convolutions of 3x3 with a tanh between them to the image.
    * The distance is bounded by a margin d: without one the second term rewards any explosion.
    * D and f take turns where the paper trains them jointly: before each local step of f, D takes
      some steps of Adam on its batch; before its first one many, since an untrained D is next to
      the identity, and the first round is attacked like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.fl import ActsOn, ClientContext, Defense, Memory, model_state
from leakatlas.params import NonNegative, Positive, PositiveInt

_START = 0.02
"""Standard deviation of the last layer's weights at the beginning: next to the identity."""


@dataclass(frozen=True, kw_only=True)
class DigestNN(Defense):
    """Trains the shared model on images that a private network has changed.

    Args:
        distance: Beta, weight of the distance; at 0 there is no private network.
        margin: d, mean squared distance per pixel, model space, beyond which nothing is gained
            (two unrelated images of a standardised space are about 2 apart).
        width: Channels between the convolutions.
        steps: Steps of D before every local step of f.
        first_steps: Those before its first one.
        lr: Of D's Adam.
    """

    key: ClassVar[str] = "digest_nn"
    knob: ClassVar[str] = "distance"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0, 10.0)
    stage: ClassVar[int] = 10
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    distance: NonNegative = 1.0
    margin: Positive = 1.0
    width: PositiveInt = 16
    steps: PositiveInt = 5
    first_steps: PositiveInt = 60
    lr: Positive = 0.005

    def workload(self, model: nn.Module) -> float:
        """A gradient for each of the first steps."""
        return 1.0 + self.first_steps if self.distance else 1.0

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """Train D a little and send the batch through it."""
        if not self.distance:
            return x, y
        memory, steps = context.memory, self.steps
        if "digest" not in memory:
            memory["digest"] = Digest(x.shape[1], self.width, x, context.generator)
            steps = self.first_steps
        self._train(memory["digest"], x, y, context, steps)
        with torch.no_grad():
            return memory["digest"](x), y

    def _train(
        self, digest: Digest, x: Tensor, y: Tensor, context: ClientContext, steps: int
    ) -> None:
        state = {name: t.detach().clone() for name, t in model_state(context.model).items()}
        optimizer = torch.optim.Adam(digest.parameters(), lr=self.lr)
        for _ in range(steps):
            with torch.enable_grad():
                changed = digest(x)
                task = context.protocol.loss(functional_call(context.model, state, (changed,)), y)
                value = task + self.distance * nearness(changed, x, self.margin)
                grads = torch.autograd.grad(value, list(digest.parameters()))
            for parameter, g in zip(digest.parameters(), grads, strict=True):
                parameter.grad = g
            optimizer.step()

    def evaluate(self, model: nn.Module, memory: Memory) -> nn.Module:
        """Behind the client's own D."""
        return nn.Sequential(memory["digest"], model) if "digest" in memory else model

    def simulate_batch_knowing(
        self, x: Tensor, y: Tensor, secrets: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The candidates, sent through the client's D (as it was in the last local step)."""
        return digested(x, secrets), y

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """The weights of D."""
        digest = memory.get("digest")
        if not isinstance(digest, Digest):
            return {}
        return {name: p.detach().clone() for name, p in digest.named_parameters()}


class Digest(nn.Module):
    """``x + convolution(tanh(convolution(x)))``, shapes kept.

    Args:
        channels: C.
        width: Channels in between.
        like: Gives dtype and device.
        generator: Of the weights.
    """

    def __init__(self, channels: int, width: int, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter((std * torch.randn(shape, generator=generator)).to(like))

        self.first = drawn(width, channels, 3, 3, std=(9 * channels) ** -0.5)
        self.shift = drawn(width, std=0.1)
        self.last = drawn(channels, width, 3, 3, std=_START)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to the same."""
        return digested(x, dict(self.named_parameters()))


def digested(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """D(x) ``(N, C, H, W)`` of the named weights; differentiable in both."""
    inner = nn.functional.conv2d(x, weights["first"], weights["shift"], padding=1).tanh()
    changed: Tensor = x + nn.functional.conv2d(inner, weights["last"], padding=1)
    return changed


def nearness(changed: Tensor, x: Tensor, margin: float) -> Tensor:
    """How much the mean squared distance per pixel lacks of the margin, mean over the batch."""
    apart = (changed - x).square().flatten(1).mean(1)
    return (margin - apart).clamp(min=0).mean()
