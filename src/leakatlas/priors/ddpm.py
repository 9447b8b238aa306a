"""A denoiser for diffusion.

T = 1,000 linear steps (Ho et al., 2020), mean squared error of the noise, Adam 2e-4, exponential
mean of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakatlas.models import Denoiser
from leakatlas.priors.lesson import Draws, Lesson, average
from leakatlas.priors.prior import linear_schedule

WIDTHS = (32, 64, 64)
"""Feature maps of each resolution, fine to coarse."""


class Denoising(Lesson):
    """A denoiser of images in [-1, 1] under the linear schedule.

    Args:
        shape: ``(C, S, S)``.
        width: Factor on the feature maps.
        batch: Images in a step.
        lr: Step size.
        decay: Of the exponential mean of the weights, at most.
    """

    measured = "error of the noise"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        width: int = 1,
        batch: int = 32,
        lr: float = 2e-4,
        decay: float = 0.9995,
    ) -> None:
        channels, size, _ = shape
        self.batch = batch
        maps = tuple(width * count for count in WIDTHS)
        self.network, self.mean = (
            Denoiser(channels=channels, size=size, widths=maps) for _ in range(2)
        )
        self.nets = nn.ModuleDict({"network": self.network, "mean": self.mean})
        self.optimizers = [torch.optim.Adam(self.network.parameters(), lr=lr)]
        self.kept, self.decay = linear_schedule(), decay

    def step(self, x: Tensor, y: Tensor, draws: Draws, progress: float) -> Tensor:
        """One step on the error of the predicted noise; that error."""
        del y
        self.kept = self.kept.to(x.device)
        t = draws.whole(0, len(self.kept), len(x))
        noise = draws.normal(*x.shape)
        loss = (self.network(noised(2 * x - 1, noise, self.kept[t]), t) - noise).square().mean()
        self.optimizers[0].zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizers[0].step()
        average(self.mean, self.network, self.decay, progress)
        error: Tensor = loss.detach()
        return error

    def result(self) -> Denoiser:
        """The denoiser with the mean weights."""
        return self.mean.eval()


def noised(x: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    r""":math:`\sqrt{\bar\alpha} x + \sqrt{1 - \bar\alpha} \epsilon`, ``kept`` ``(N,)``."""
    share = kept.to(x)[:, None, None, None]
    return share.sqrt() * x + (1 - share).sqrt() * noise
