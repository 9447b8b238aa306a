"""How alike a prior's pictures and a population's images are: a Fréchet distance of few features.

A proxy for FID, which needs those of Inception, a download. Here they are of the shipped ConvNet,
the means of its last 128 feature maps, at 32 pixels and with grey repeated. It knows ten kinds of
small photos; the figure tells priors of one population apart, by equally many images, and nothing
else. Beside it stands what other images of the population reach, which is not 0 either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.metrics.distribution import Frechet, frechet_distance
from leakatlas.models import ConvNet, checkpoints
from leakatlas.priors import Diffusion, Prior
from leakatlas.priors.prior import fit_pixels

NETWORK = "convnet-cifar10"
"""Whose features."""
IMAGES = 1_000
"""Pictures, and images of the population, at most."""
STEPS = 50
"""Of a denoiser, from noise to a picture."""


def feature_fid(x_hat: Tensor, x: Tensor, *, batch: int = 250) -> Frechet:
    """Fréchet distance of the shipped network's features.

    Args:
        x_hat: Pictures ``(N, C, H, W)`` in [0, 1].
        x: Images ``(M, C, H, W)`` in [0, 1].
        batch: Images that pass the network at once.

    Raises:
        InvalidInput: If a side has fewer than two images, or a value is not finite.
    """
    network, box = checkpoints.pretrained(NETWORK), checkpoints.card(NETWORK).box
    assert isinstance(network, ConvNet) and box is not None
    space = Box.from_json(box)

    def features(pixels: Tensor) -> Tensor:
        fitted = fit_pixels(pixels.detach().float().cpu(), (3, 32, 32)).clamp(0, 1)
        return torch.cat(
            [network.features(space.normalize(part)).mean((2, 3)) for part in fitted.split(batch)]
        )

    with torch.no_grad():
        return frechet_distance(features(x_hat), features(x), measure=f"feature FID ({NETWORK})")


def of_prior(
    prior: Prior | Diffusion,
    pixels: Tensor,
    labels: Tensor | None = None,
    *,
    watch: Watch | None = None,
) -> dict[str, float]:
    """What a card says of a prior's pictures; nothing if there are fewer than four images.

    Args:
        prior: On the CPU.
        pixels: ``(M, C, H, W)`` in [0, 1], of its population; the first half, at most
            :data:`IMAGES`, is what its pictures are held against, the next as many are the others.
        labels: ``(M,)``, for a conditional prior: it draws pictures of the first half's.
        watch: Told how far a denoiser is, whose pictures take a while.
    """
    count = min(IMAGES, len(pixels) // 2)
    if count < 2:
        return {}
    real, others = fit_pixels(pixels[: 2 * count].float(), prior.shape).split(count)
    generator = torch.Generator().manual_seed(0)
    if isinstance(prior, Diffusion):
        drawn = denoised(prior, count, generator=generator, watch=watch or Watch())
    else:
        told = None if labels is None else labels[:count]
        drawn = _decoded(prior, prior.sample(count, generator=generator, like=real), told)
    return {
        "feature_fid": round(feature_fid(drawn, real).value, 3),
        "feature_fid_of_other_images": round(feature_fid(others, real).value, 3),
        "feature_fid_images": count,
    }


@torch.no_grad()
def _decoded(prior: Prior, z: Tensor, labels: Tensor | None) -> Tensor:
    return torch.cat(
        [
            prior.decoder(None if labels is None else labels[part])(z[part])
            for part in torch.arange(len(z)).split(50)
        ]
    )


@torch.no_grad()
def denoised(
    prior: Diffusion,
    count: int,
    *,
    generator: torch.Generator,
    watch: Watch,
    steps: int = STEPS,
    batch: int = 100,
) -> Tensor:
    """Pictures of a denoiser: deterministic steps from noise, each estimate of the image clamped.

    Args:
        prior: The denoiser.
        count: How many.
        generator: Of the noise.
        watch: Told how far it is; without a budget, which would end it before the picture.
        steps: At times that are spread evenly over the schedule.
        batch: Pictures at once.

    Returns:
        ``(count, C, H, W)`` in [0, 1].

    Source:
        Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, equation 12 with sigma 0.
    """
    noise = torch.randn(count, *prior.shape, generator=generator)
    times = torch.linspace(len(prior.kept) - 1, 0, min(steps, len(prior.kept))).round().long()
    shares = [float(prior.kept[t]) for t in times] + [1.0]
    pictures = list(noise.split(batch))
    for made in watch.steps(len(pictures) * len(times)):
        part, step = divmod(made.index, len(times))
        x, now, then = pictures[part], shares[step], shares[step + 1]
        clean = (x - (1 - now) ** 0.5 * prior.noise(x, int(times[step]))) / now**0.5
        clean = clean.clamp(-1, 1)
        left = (x - now**0.5 * clean) / (1 - now) ** 0.5
        pictures[part] = then**0.5 * clean + (1 - then) ** 0.5 * left
    return (torch.cat(pictures) + 1) / 2
