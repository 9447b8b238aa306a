"""The generator as the decoder of a variational autoencoder.

Gaussian likelihood at its optimal variance (Rybkin et al., 2021), KL weight 3 (at 1 the latents of
real images fill the space so sparsely that samples are blobs), Adam under a one-cycle schedule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from leakatlas.models import Generator
from leakatlas.priors.lesson import Draws, Lesson, widths


class Encoder(nn.Module):
    """Mean and log variance of the latent, ``(N, latent)`` each, of images ``(N, C, S, S)``.

    Args:
        channels: Channels of an image.
        size: Its side S.
        latent: Length of the latent.
    """

    def __init__(self, *, channels: int, size: int, latent: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (32, 64, 128) if size < 64 else (16, 32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU()]
            channels, size = width, -(-size // 2)
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * size * size, 2 * latent)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        mean, log_variance = self.body(2 * x - 1).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)


class Autoencoder(Lesson):
    """A generator as the decoder of a variational autoencoder.

    Args:
        shape: ``(C, S, S)``.
        latent: Length of the latent.
        width: Factor on the generator's feature maps.
        batch: Images in a step.
        lr: Peak step size.
        kl_weight: Weight of the divergence from the standard normal.
    """

    measured = "training PSNR (dB)"

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent: int,
        *,
        width: int = 1,
        batch: int = 64,
        lr: float = 3e-3,
        kl_weight: float = 3.0,
    ) -> None:
        channels, size, _ = shape
        self.batch = batch
        self.encoder = Encoder(channels=channels, size=size, latent=latent)
        self.generator = Generator(
            latent=latent, channels=channels, size=size, widths=widths(size, width)
        )
        self.nets = nn.ModuleDict({"encoder": self.encoder, "generator": self.generator})
        self.optimizers = [torch.optim.Adam(self.nets.parameters(), lr=lr)]
        self.lr, self.kl_weight = lr, kl_weight

    def step(self, x: Tensor, y: Tensor, draws: Draws, progress: float) -> Tensor:
        """One step on the evidence bound; the PSNR."""
        del y
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.lr * one_cycle(progress)
        mean, log_variance = self.encoder(x)
        noise = draws.normal(*mean.shape)
        x_hat = self.generator(mean + noise * (0.5 * log_variance).exp())
        self.optimizers[0].zero_grad(set_to_none=True)
        loss = likelihood(x, x_hat) + self.kl_weight * divergence(mean, log_variance)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.nets.parameters(), 1_000.0)
        self.optimizers[0].step()
        error = (x - x_hat.detach()).square().mean()
        psnr: Tensor = -10 * error.log10()
        return psnr

    def result(self) -> Generator:
        """The decoder."""
        return self.generator.eval()


def one_cycle(progress: float, *, rise: float = 0.3) -> float:
    """Factor on the step size: half a cosine up from 1/25, then half a cosine down to 0."""
    if progress < rise:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * progress / rise))
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def likelihood(x: Tensor, x_hat: Tensor) -> Tensor:
    """Negative Gaussian log likelihood per image at the optimal variance, up to a constant."""
    return 0.5 * math.prod(x.shape[1:]) * (x - x_hat).square().mean().log()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from the standard normal, in nats per image."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
