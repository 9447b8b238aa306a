"""What an attack may ask of a generative prior."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidParameter
from leakatlas.models import Card

CEILING = "held_out_inversion_psnr_db"
"""The figure of a card that bounds every search among what the prior can draw: the PSNR of its
best picture of a held-out image that it is shown."""

INVERTED = 64
"""Held-out images behind :data:`CEILING`, at most."""


Part = Callable[..., tuple[Tensor, ...]]
"""One stage of a generator: what it gives is what the next one takes.

The first tensor is the feature, which a search may move; those beside it (the embedding of a class,
styles, the image so far) stay what they are.
"""


@dataclass(frozen=True, eq=False)
class Prior:
    """A generator, and where it comes from.

    Args:
        network: Maps latents (and labels) to pixels of [0, 1]; in eval mode.
        card: Provenance: data, split, seed, recipe, licence, figures.
        latent: Shape of one latent; standard normal latents give plausible images.
        shape: ``(C, H, W)`` of what it draws.
        classes: Labels that it is conditioned on; 0 if unconditional.
        stages: What the network is made of, if it can be opened: the first takes what the network
            takes, the last gives its pixels alone.
        seen: ``(M,)`` fingerprints of the images that it was trained on, sorted.
    """

    network: nn.Module
    card: Card
    latent: tuple[int, ...]
    shape: tuple[int, int, int]
    classes: int = 0
    stages: tuple[Part, ...] = ()
    seen: Tensor | None = None

    def at(self, like: Tensor) -> Prior:
        """The same prior frozen, in eval mode, on the device and in the dtype of ``like``."""
        network = self.network.to(like).eval().requires_grad_(False)
        return Prior(
            network, self.card, self.latent, self.shape, self.classes, self.stages, self.seen
        )

    def sample(self, *before: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """Latents ``(*before, *latent)`` of the distribution that it was learned with."""
        shape = (*before, *self.latent)
        return torch.randn(shape, generator=generator, device=generator.device).to(like)

    def inputs(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the network is called with: latents, and labels where it is conditional.

        Raises:
            InvalidParameter: If it is conditional and there are no labels, or unknown ones.
        """
        if not self.classes:
            return (z,)
        if y is None or bool((y >= self.classes).any()):
            raise InvalidParameter(
                f"The prior {self.card.name!r} draws images of {self.classes} labels; it needs the "
                "label of each image, one of these. Take an unconditional prior otherwise."
            )
        return z, y

    def decoder(self, y: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Latents ``(N, *latent)`` to pixels of [0, 1], for images of these labels."""
        return lambda z: self.network(*self.inputs(z, y))

    def knows(self, pixels: Tensor) -> Tensor:
        """``(N,)`` whether images of [0, 1] are among those that it was trained on.

        Equal at 8 bits after a resize to the prior's size, mirrored ones included; a copy that was
        compressed anew goes unnoticed.
        """
        if self.seen is None:
            return torch.zeros(len(pixels), dtype=torch.bool)
        held = self.seen.cpu()
        found = [torch.isin(fingerprints(x, self.shape), held) for x in (pixels, pixels.flip(3))]
        return found[0] | found[1]

    @property
    def ceiling(self) -> float | None:
        """PSNR in dB of its best pictures of held-out images; None if its card does not say."""
        return self.card.figures.get(CEILING)


def alone(stage: nn.Module) -> Part:
    """A stage that needs nothing beside the feature."""
    return lambda h: (stage(h),)


def through(stages: Sequence[Part], *state: Tensor) -> Tensor:
    """The image that follows from what the first of these stages takes."""
    for stage in stages:
        state = stage(*state)
    return state[0]


@dataclass(frozen=True, eq=False)
class Diffusion:
    r"""A denoiser :math:`\epsilon_\phi(x_t, t)` with its schedule, and where it comes from.

    Args:
        network: ``(x_t, t) -> noise``, for images in [-1, 1].
        card: Provenance.
        shape: ``(C, H, W)`` of its images.
        kept: ``(T,)`` :math:`\bar\alpha_t`, the share of the image's variance that is left.
        seen: As for :class:`Prior`.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    card: Card
    shape: tuple[int, int, int]
    kept: Tensor
    seen: Tensor | None = None

    def knows(self, pixels: Tensor) -> Tensor:
        """As :meth:`Prior.knows`."""
        return Prior(nn.Identity(), self.card, (), self.shape, seen=self.seen).knows(pixels)

    def noise(self, x: Tensor, t: int) -> Tensor:
        r""":math:`\epsilon_\phi(x, t)`; what a network says of the variance is left out."""
        times = torch.full((len(x),), t, device=x.device)
        return self.network(x, times)[:, : x.shape[1]]


def linear_schedule(T: int = 1_000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    r""":math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`, beta from ``first`` to ``last``."""
    return (1 - torch.linspace(first, last, T, dtype=torch.float64)).cumprod(0)


def empirical(images: Tensor, kept: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The exact denoiser of a set of images: no training, and no other image comes out of it.

    .. math:: \hat x_0 = \sum_n \mathrm{softmax}_n\Bigl(-\frac{\lVert x_t - \sqrt{\bar\alpha_t}
              x_n \rVert^2}{2 (1 - \bar\alpha_t)}\Bigr)\, x_n, \qquad
              \epsilon = \frac{x_t - \sqrt{\bar\alpha_t}\, \hat x_0}{\sqrt{1 - \bar\alpha_t}}

    Args:
        images: ``(M, C, H, W)`` in [-1, 1].
        kept: ``(T,)`` shares of variance, :math:`\bar\alpha_t`.
    """

    def noise(x: Tensor, t: Tensor) -> Tensor:
        share = kept.to(x)[t][:, None]
        known = images.to(x).flatten(1)
        apart = (x.flatten(1)[:, None] - share.sqrt()[:, None] * known).square().sum(2)
        weights = (-apart / (2 * (1 - share))).softmax(1)
        clean = (weights @ known).reshape(x.shape)
        share = share[:, :, None, None]
        return (x - share.sqrt() * clean) / (1 - share).sqrt()

    return noise


def fingerprints(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """``(N,)`` int32 of images ``(N, C, H, W)`` in [0, 1]: a hash at ``shape`` and 8 bits."""
    fitted = fit_pixels(pixels.detach().float().cpu(), shape)
    whole = (fitted.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=4).digest() for image in whole]
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int32)


def fit_pixels(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images of [0, 1] at another ``(C, H, W)``: grey by the mean, resized with antialiasing."""
    if pixels.shape[1] != shape[0]:
        pixels = pixels.mean(1, keepdim=True).expand(-1, shape[0], -1, -1)
    if pixels.shape[2:] != shape[1:]:
        pixels = F.interpolate(pixels, size=shape[1:], mode="bilinear", antialias=True)
        pixels = pixels.clamp(0, 1)
    return pixels.contiguous()


def inversion_psnr(
    prior: Prior,
    pixels: Tensor,
    labels: Tensor | None = None,
    *,
    steps: int = 300,
    lr: float = 0.05,
    watch: Watch | None = None,
) -> float:
    """Mean PSNR in dB of the best latents that Adam finds from 0 with the images in sight.

    Args:
        prior: The prior.
        pixels: ``(N, C, H, W)`` in [0, 1], fitted to the prior first.
        labels: Of a conditional prior.
        steps: Steps of Adam.
        lr: Its step size.
        watch: Ends the search early; the figure is then of the latents so far.
    """
    x = fit_pixels(pixels, prior.shape)
    decode = prior.at(x).decoder(labels)
    return closest(decode, prior.latent, x, steps=steps, lr=lr, watch=watch or Watch())


def closest(
    decode: Callable[[Tensor], Tensor],
    latent: tuple[int, ...],
    x: Tensor,
    *,
    steps: int,
    lr: float,
    watch: Watch,
) -> float:
    """As :func:`inversion_psnr`, of a decoder and images ``x`` that fit it."""
    z = torch.zeros(len(x), *latent, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=lr)
    with torch.enable_grad():
        for _ in watch.steps(steps):
            optimizer.zero_grad()
            torch.autograd.backward((decode(z) - x).square().flatten(1).mean(1).sum())
            optimizer.step()
    with torch.no_grad():
        error = (decode(z) - x).square().flatten(1).mean(1)
    return float(-10 * error.log10().mean())
