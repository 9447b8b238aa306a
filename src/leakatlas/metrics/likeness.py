"""How alike a prior's pictures and a population's images are: a Fréchet distance of few features.

A proxy for FID, which needs those of Inception, a download. Here they are of the shipped ConvNet,
the means of its last 128 feature maps, at 32 pixels and with grey repeated. It knows ten kinds of
small photos; the figure tells priors of one population apart, by equally many images, and nothing
else. Beside it stands what other images of the population reach, which is not 0 either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.data import Box
from leakatlas.metrics.distribution import Frechet, frechet_distance
from leakatlas.models import ConvNet, checkpoints
from leakatlas.priors import Prior
from leakatlas.priors.prior import fit_pixels

NETWORK = "convnet-cifar10"
"""Whose features."""
IMAGES = 1_000
"""Pictures, and images of the population, at most."""


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


def of_prior(prior: Prior, pixels: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """What a card says of a prior's pictures; nothing if there are fewer than four images.

    Args:
        prior: On the CPU.
        pixels: ``(M, C, H, W)`` in [0, 1], of its population; the first half, at most
            :data:`IMAGES`, is what its pictures are held against, the next as many are the others.
        labels: ``(M,)``, for a conditional prior: it draws pictures of the first half's.
    """
    count = min(IMAGES, len(pixels) // 2)
    if count < 2:
        return {}
    real, others = fit_pixels(pixels[: 2 * count].float(), prior.shape).split(count)
    z = prior.sample(count, generator=torch.Generator().manual_seed(0), like=real)
    told = None if labels is None else labels[:count]
    with torch.no_grad():
        drawn = torch.cat(
            [
                prior.decoder(None if told is None else told[part])(z[part])
                for part in torch.arange(count).split(50)
            ]
        )
    return {
        "feature_fid": round(feature_fid(drawn, real).value, 3),
        "feature_fid_of_other_images": round(feature_fid(others, real).value, 3),
        "feature_fid_images": count,
    }
