"""Perceptual distance through the real libraries, if their weights are on this machine.

Nothing is downloaded here. A measure whose backbone is missing raises
:class:`leakatlas.errors.Unavailable` and names the command that fetches it; a randomly
initialised backbone is a different measure and never stands in.

What is where: the linear heads of LPIPS v0.1 (a few kilobytes a network) travel inside
torchmetrics, a core dependency, and equal those inside ``lpips`` 0.1.4 bit for bit; on one and the
same backbone the two packages' values differ by 1e-8 (SqueezeNet, 64 pixels, noise of 0.1). The
backbones are torchvision's ImageNet weights, which no package carries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable
from leakatlas.metrics import _checks

Net = Literal["alex", "vgg", "squeeze"]

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""torchvision's name of each backbone."""

SMALLEST_SIDE = 32
"""Below this the pooling stages of the backbones have nothing left to pool."""


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """A perceptual distance with everything that must be printed beside it.

    Args:
        values: One distance an image, ``(N,)`` float64; 0 means equal.
        measure: Name and version.
        net: Backbone.
        input_range: Range in which the backbone was fed.
        resize: Side to which images were resized, None if they were not.
    """

    values: Tensor
    measure: str
    net: str
    input_range: str
    resize: int | None = None


def weights_file(net: Net) -> Path:
    """Where the ImageNet weights of a backbone lie once fetched."""
    if net not in BACKBONES:
        raise InvalidParameter(f"net={net!r}: expected one of {', '.join(BACKBONES)}.")
    from torchvision.models import get_model_weights  # takes seconds to import, like torchmetrics

    url = get_model_weights(BACKBONES[net]).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def available(net: Net = "alex") -> bool:
    """Are the weights of this backbone on disk?"""
    return weights_file(net).is_file()


def _prepared(who: str, x_hat: Tensor, x: Tensor, net: Net) -> tuple[Tensor, Tensor]:
    _checks.pair(who, x_hat, x)
    if not available(net):
        name = BACKBONES[net]
        raise Unavailable(
            f"{who}(net={net!r}): expected ImageNet weights at {weights_file(net)}, found none; "
            f'fetch them with: python -c "import torchvision; '
            f"torchvision.models.{name}(weights='DEFAULT')\""
        )
    channels, side = x.shape[1], min(x.shape[2:])
    if channels not in (1, 3):
        raise InvalidInput(f"{who}: backbones see 1 or 3 channels, got {channels}.")
    if side < SMALLEST_SIDE:
        raise InvalidInput(
            f"{who}: needs sides of at least {SMALLEST_SIDE} pixels, got {tuple(x.shape[2:])}; "
            "use ssim."
        )
    return (
        x_hat.float().expand(-1, 3, -1, -1).clamp(0, 1),
        x.float().expand(-1, 3, -1, -1).clamp(0, 1),
    )


def lpips(x_hat: Tensor, x: Tensor, *, net: Net = "alex") -> Perceptual:
    """Learned perceptual image patch similarity v0.1 (Zhang et al., CVPR 2018).

    Fed in [-1, 1] as published; one channel is repeated to three. Below 64 pixels the deepest
    features are 1x1, and values are not comparable with those of larger images.

    Raises:
        Unavailable: If the backbone's weights are not on disk.
        InvalidInput: If the images are smaller than 32 pixels or have 2, 4 or more channels.
    """
    first, second = _prepared("lpips", x_hat, x, net)
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    with torch.no_grad():
        values = [
            learned_perceptual_image_patch_similarity(
                a[None], b[None], net_type=net, normalize=True
            )
            for a, b in zip(first, second, strict=True)
        ]
    return Perceptual(
        values=torch.tensor([float(v) for v in values], dtype=torch.float64, device=x.device),
        measure="LPIPS v0.1",
        net=net,
        input_range="[-1, 1]",
    )


def dists(x_hat: Tensor, x: Tensor) -> Perceptual:
    """Deep image structure and texture similarity (Ding et al., TPAMI 2020), VGG-16.

    Raises:
        Unavailable: If the backbone's weights are not on disk.
        InvalidInput: As :func:`lpips`.
    """
    first, second = _prepared("dists", x_hat, x, "vgg")
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity

    with torch.no_grad():
        values = deep_image_structure_and_texture_similarity(first, second, reduction="none")
    return Perceptual(
        values=values.double().reshape(-1), measure="DISTS", net="vgg", input_range="[0, 1]"
    )
