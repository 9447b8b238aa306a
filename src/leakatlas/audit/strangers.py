"""Public photos that everybody has: the bundled ones, in the shape of somebody's private images."""

from __future__ import annotations

import functools

import torch

from leakatlas.data import ImageSet, patches

COUNT = 96
"""Crops to choose from."""

CONTRAST = 0.1
"""Standard deviation of the pixels below which a crop is left out: flat sky tests no attack."""


def photos_like(victims: ImageSet) -> ImageSet:
    """Crops of bundled photos in the victims' shape, most of them of things that fill the frame.

    Where the victims themselves are bundled photos, crops of the surrogate part are taken, which
    shares no pixel with them.

    Args:
        victims: Of which shape and name are read, nothing else.
    """
    bundled = victims.name.startswith(("photos-", "patches-"))
    return _crops(victims.shape, "surrogate" if bundled else "all")


@functools.cache
def _crops(shape: tuple[int, int, int], part: str) -> ImageSet:
    channels, height, width = shape
    crops = patches(max(height, width), COUNT, part=part)
    images = crops.images[:, :, :height, :width]
    if channels != images.shape[1]:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1).contiguous()
    lively = images.flatten(1).std(1) > CONTRAST
    if int(lively.sum()) < len(images) // 4:
        lively = torch.ones_like(lively)
    return ImageSet(
        images[lively], crops.labels[lively], crops.classes, f"strangers ({crops.name})"
    )
