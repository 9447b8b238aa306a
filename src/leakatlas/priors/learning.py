r"""How a prior is learned: three recipes, one loop.

**vae**: the generator is the decoder of a variational autoencoder. Gaussian likelihood at its
optimal variance (Rybkin et al., 2021), KL weight 3 (at 1 the latents of real images fill the space
so sparsely that samples are blobs), Adam under a one-cycle schedule. Minutes on a CPU, and of the
three the one whose latents come closest to a given image.

**gan**: the same generator against a spectrally normalised critic (Miyato et al., 2018; with labels
their projection), hinge loss, Adam 2e-4 (.5, .999), one step each, differentiable augmentation
(Zhao et al., 2020), exponential mean of the generator's weights.

**ddpm**: a denoiser under T = 1,000 linear steps (Ho et al., 2020), mean squared error of the
noise, Adam 2e-4, exponential mean of the weights.

Horizontal flips throughout, unless told otherwise.
"""

from __future__ import annotations

import io
import math
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from leakatlas import sealed
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.errors import InvalidInput
from leakatlas.models import Denoiser, Generator
from leakatlas.priors.prior import fit_pixels, linear_schedule

Kind = Literal["vae", "gan", "ddpm"]
KINDS: tuple[Kind, ...] = ("vae", "gan", "ddpm")

COARSEST = 8
"""Sides of generated images are multiples of it: three doublings."""

SAVE_EVERY = 200
"""Steps between two checkpoints."""

_UNREADABLE: tuple[type[Exception], ...] = (*sealed.MALFORMED, pickle.UnpicklingError)


def drawn_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The square ``(C, S, S)`` of a generator whose images cover ``shape`` = ``(C, H, W)``."""
    size = -(-max(shape[1:]) // COARSEST) * COARSEST
    return shape[0], size, size


def widths(size: int) -> tuple[int, ...]:
    """Feature maps of a generator's resolutions, coarse to fine."""
    return (96, 64, 48, 24) if size < 64 else (96, 64, 48, 32, 16)


def batch_of(size: int) -> int:
    """Images in a step."""
    return 64 if size < 64 else 32


class Lesson(ABC):
    """What is learned, and one step of learning it.

    Attributes:
        nets: Everything with weights, for checkpoints.
        optimizers: In a fixed order, for checkpoints.
    """

    nets: nn.ModuleDict
    optimizers: list[torch.optim.Optimizer]
    batch: int

    @abstractmethod
    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float) -> str:
        """Learn from images ``(N, C, S, S)`` of [0, 1] with labels; a note for people."""

    @abstractmethod
    def result(self) -> nn.Module:
        """What was learned, in eval mode."""


def lesson(kind: Kind, shape: tuple[int, int, int], *, latent: int, classes: int = 0) -> Lesson:
    """The recipe of a kind, its networks freshly drawn from the global generator's seed.

    Raises:
        InvalidInput: If only a GAN can be conditional and another kind is asked for.
    """
    if classes and kind != "gan":
        raise InvalidInput(f"A prior of kind {kind!r} is not conditional; only a gan takes labels.")
    match kind:
        case "vae":
            return Autoencoder(shape, latent)
        case "gan":
            return Adversaries(shape, latent, classes)
        case "ddpm":
            return Denoising(shape)


def teach(
    taught: Lesson,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    watch: Watch,
    flips: bool = True,
    checkpoint: Path | None = None,
) -> int:
    """Learn from images for so many steps, in place; the steps that were made.

    Args:
        taught: What learns.
        images: ``(M, C, S, S)`` in [0, 1].
        labels: ``(M,)``.
        steps: Steps.
        generator: Order, flips and noise.
        watch: Budget and progress; fewer steps than asked for go through the whole schedule.
        flips: Whether half the images are mirrored.
        checkpoint: A file to go on from, and to leave behind if stopped.
    """
    batch = min(taught.batch, len(images))
    first = 0 if checkpoint is None else _resume(checkpoint, taught, steps, generator)
    made = first
    for step in watch.steps(steps, first=first, stretches=True, fewest=FEWEST):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        x, y = images[chosen], labels[chosen]
        if flips:
            mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        watch.note = taught.step(x, y, generator, step.progress)
        made = step.index + 1
        if checkpoint is not None and made % SAVE_EVERY == 0:
            _keep(checkpoint, taught, made, steps, generator)
    if checkpoint is not None:
        _keep(checkpoint, taught, made, steps, generator)
    return made


def _keep(file: Path, taught: Lesson, made: int, steps: int, generator: torch.Generator) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "steps": steps,
            "made": made,
            "nets": taught.nets.state_dict(),
            "optimizers": [o.state_dict() for o in taught.optimizers],
            "draws": generator.get_state(),
            "global": torch.get_rng_state(),
        },
        buffer,
    )
    sealed.seal(file, buffer.getvalue())


def _resume(file: Path, taught: Lesson, steps: int, generator: torch.Generator) -> int:
    """Steps that were made already; 0 if nothing usable is kept."""
    content = sealed.unseal(file)
    if content is None:
        return 0
    try:
        held: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        if held["steps"] != steps:
            sealed.discard(file, "it belongs to a training of another length")
            return 0
        taught.nets.load_state_dict(held["nets"])
        for optimizer, state in zip(taught.optimizers, held["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        generator.set_state(held["draws"])
        torch.set_rng_state(held["global"])
        return int(held["made"])
    except _UNREADABLE:
        sealed.discard(file, "it is not a checkpoint of this training")
        return 0


# -- a variational autoencoder -------------------------------------------------------------------


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
        lr: Peak step size.
        kl_weight: Weight of the divergence from the standard normal.
    """

    def __init__(
        self, shape: tuple[int, int, int], latent: int, *, lr: float = 3e-3, kl_weight: float = 3.0
    ) -> None:
        channels, size, _ = shape
        self.batch = batch_of(size)
        self.encoder = Encoder(channels=channels, size=size, latent=latent)
        self.generator = Generator(latent=latent, channels=channels, size=size, widths=widths(size))
        self.nets = nn.ModuleDict({"encoder": self.encoder, "generator": self.generator})
        self.optimizers = [torch.optim.Adam(self.nets.parameters(), lr=lr)]
        self.lr, self.kl_weight = lr, kl_weight

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float) -> str:
        """One step on the evidence bound."""
        del y
        for group in self.optimizers[0].param_groups:
            group["lr"] = self.lr * one_cycle(progress)
        mean, log_variance = self.encoder(x)
        noise = torch.randn(mean.shape, generator=generator)
        x_hat = self.generator(mean + noise * (0.5 * log_variance).exp())
        self.optimizers[0].zero_grad(set_to_none=True)
        loss = likelihood(x, x_hat) + self.kl_weight * divergence(mean, log_variance)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.nets.parameters(), 1_000.0)
        self.optimizers[0].step()
        error = (x - x_hat.detach()).square().mean()
        return f"training PSNR {float(-10 * error.log10()):.1f} dB"

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


# -- a generative adversarial network ------------------------------------------------------------


class Critic(nn.Module):
    """How real images ``(N, C, S, S)`` of [-1, 1] look, ``(N,)``; spectrally normalised.

    Args:
        channels: Channels of an image.
        size: Its side S.
        classes: Labels of the projection; none if 0.
    """

    def __init__(self, *, channels: int, size: int, classes: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (32, 64, 128) if size < 64 else (16, 32, 64, 128):
            convolution = nn.Conv2d(channels, width, 4, stride=2, padding=1)
            layers += [parametrizations.spectral_norm(convolution), nn.LeakyReLU(0.2)]
            channels, size = width, size // 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        features = channels * size * size
        self.head = parametrizations.spectral_norm(nn.Linear(features, 1))
        self.projection = (
            parametrizations.spectral_norm(nn.Embedding(classes, features)) if classes else None
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The critic's scores."""
        h = self.body(x)
        score: Tensor = self.head(h).squeeze(1)
        if self.projection is not None:
            score = score + (self.projection(y) * h).sum(1)
        return score


class Adversaries(Lesson):
    """A generator against a critic.

    Args:
        shape: ``(C, S, S)``.
        latent: Length of the latent.
        classes: Labels; 0 for none.
        lr: Step size of both.
        decay: Of the exponential mean of the generator's weights, at most.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        latent: int,
        classes: int = 0,
        *,
        lr: float = 2e-4,
        decay: float = 0.999,
    ) -> None:
        channels, size, _ = shape
        self.batch = batch_of(size)
        settings: dict[str, Any] = {
            "latent": latent, "channels": channels, "size": size, "classes": classes,
            "widths": widths(size),
        }  # fmt: skip
        self.generator, self.mean = Generator(**settings), Generator(**settings)
        self.critic = Critic(channels=channels, size=size, classes=classes)
        self.nets = nn.ModuleDict(
            {"generator": self.generator, "mean": self.mean, "critic": self.critic}
        )
        self.optimizers = [
            torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.999))
            for net in (self.critic, self.generator)
        ]
        self.decay = decay

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float) -> str:
        """One step of the critic, one of the generator."""
        judge, draw = self.optimizers

        def fake() -> Tensor:
            z = torch.randn(len(x), self.generator.latent, generator=generator)
            drawn: Tensor = self.generator(z, y if self.generator.classes else None)
            return drawn

        with torch.no_grad():
            made = fake()
        both = augmented(torch.cat([x, made]), generator)
        real, false = self.critic(2 * both - 1, torch.cat([y, y])).chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + false).mean()
        judge.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        judge.step()
        score = -self.critic(2 * augmented(fake(), generator) - 1, y).mean()
        draw.zero_grad(set_to_none=True)
        torch.autograd.backward(score)
        draw.step()
        average(self.mean, self.generator, self.decay, progress)
        return f"critic {float(loss.detach()):.2f}"

    def result(self) -> Generator:
        """The generator with the mean weights."""
        return self.mean.eval()


def average(mean: nn.Module, now: nn.Module, decay: float, progress: float) -> None:
    """Move the exponential mean of weights; while the run is young, it forgets faster."""
    share = 1 - min(decay, 0.9 + 0.1 * progress)
    with torch.no_grad():
        for kept, new in zip(mean.parameters(), now.parameters(), strict=True):
            kept.lerp_(new, share)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images of [0, 1] with other brightness and contrast, shifted, and with a square cut out."""
    count, _, height, width = x.shape

    def draws(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    x = x + 0.5 * (draws(count, 1, 1, 1) - 0.5)
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * (draws(count, 1, 1, 1) + 0.5) + middle
    rows, columns = torch.arange(height), torch.arange(width)
    reach = height // 8
    by = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    padded = F.pad(x, (1, 1, 1, 1))
    row = (rows + by[0] + 1).clamp(0, height + 1)
    column = (columns + by[1] + 1).clamp(0, width + 1)
    x = padded[torch.arange(count)[:, None, None], :, row[:, :, None], column[:, None, :]]
    x = x.permute(0, 3, 1, 2)
    corner = (draws(2, count, 1) * torch.tensor([height, width])[:, None, None]).floor()
    side = height // 3
    cut = ((rows - corner[0]).abs() <= side // 2)[:, :, None] & (
        (columns - corner[1]).abs() <= side // 2
    )[:, None, :]
    return x * ~cut[:, None]


# -- a diffusion model ---------------------------------------------------------------------------


class Denoising(Lesson):
    """A denoiser of images in [-1, 1] under the linear schedule.

    Args:
        shape: ``(C, S, S)``.
        lr: Step size.
        decay: Of the exponential mean of the weights, at most.
    """

    batch = 32

    def __init__(
        self, shape: tuple[int, int, int], *, lr: float = 2e-4, decay: float = 0.9995
    ) -> None:
        channels, size, _ = shape
        self.network, self.mean = (Denoiser(channels=channels, size=size) for _ in range(2))
        self.nets = nn.ModuleDict({"network": self.network, "mean": self.mean})
        self.optimizers = [torch.optim.Adam(self.network.parameters(), lr=lr)]
        self.kept, self.decay = linear_schedule(), decay

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, progress: float) -> str:
        """One step on the error of the predicted noise."""
        del y
        t = torch.randint(len(self.kept), (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = (self.network(noised(2 * x - 1, noise, self.kept[t]), t) - noise).square().mean()
        self.optimizers[0].zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizers[0].step()
        average(self.mean, self.network, self.decay, progress)
        return f"noise error {float(loss.detach()):.3f}"

    def result(self) -> Denoiser:
        """The denoiser with the mean weights."""
        return self.mean.eval()


def noised(x: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    r""":math:`\sqrt{\bar\alpha} x + \sqrt{1 - \bar\alpha} \epsilon`, ``kept`` ``(N,)``."""
    share = kept.to(x)[:, None, None, None]
    return share.sqrt() * x + (1 - share).sqrt() * noise


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images of [0, 1] as training takes them: float32 at ``shape``."""
    return fit_pixels(images.detach().float().cpu(), shape)
