"""Labelled images in [0, 1]: the one form in which every data set reaches the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.errors import InvalidInput, InvalidParameter

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in ITU-R BT.601, which Pillow's grey follows too."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels and class names; two sets are the same if their fingerprints are.

    Args:
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64, each an index into ``classes``; or ``(N, K)`` float32 targets with
            one entry for each class (several labels at once, probabilities, values).
        classes: The name of each class.
        name: What the set is called in reports and recipes.
        notes: How what was given was understood, for people; no part of the fingerprint.

    Raises:
        InvalidInput: If shapes, types or values do not fit; the message names the first misfit.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_images(self.images, self.name)
        _check_labels(self.labels, len(self.images), self.classes, self.name)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "notes", tuple(self.notes))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(C, H, W)``."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def channels(self) -> int:
        """Channels of one image."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Side of one square image.

        Raises:
            InvalidInput: If the images are not square.
        """
        _, height, width = self.shape
        if height != width:
            raise InvalidInput(
                f"{self.name}: images of {height}x{width} pixels have no single size; "
                f"use shape, or resize() them first."
            )
        return height

    def subset(self, indices: Sequence[int] | Tensor) -> Self:
        """The images at ``indices``, in that order; class names stay.

        Raises:
            InvalidInput: If an index is outside the set.
        """
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)
        if index.ndim != 1:
            raise InvalidInput(
                f"{self.name}: subset expects a list of indices; got shape {tuple(index.shape)}."
            )
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise InvalidInput(
                f"{self.name}: subset expects indices in [0, {len(self) - 1}]; got "
                f"{int(index.min())} to {int(index.max())}."
            )
        return replace(self, images=self.images[index], labels=self.labels[index])

    def split(self, fraction: float, generator: torch.Generator) -> tuple[Self, Self]:
        """Two disjoint random parts, the first with ``round(fraction * N)`` images.

        Raises:
            InvalidParameter: If ``fraction`` is outside [0, 1].
        """
        if not 0.0 <= fraction <= 1.0:
            raise InvalidParameter(f"split expects a fraction in [0, 1]; got {fraction}.")
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        first = round(fraction * len(self))
        return self.subset(order[:first]), self.subset(order[first:])

    def to(self, device: torch.device) -> Self:
        """The same images on another device."""
        if self.images.device == device == self.labels.device:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def resize(self, size: int) -> Self:
        """All images at ``size`` x ``size`` pixels (antialiased bilinear, kept in [0, 1])."""
        if size < 1:
            raise InvalidParameter(f"resize expects a positive size; got {size}.")
        if self.shape[1:] == (size, size):
            return self
        resized = F.interpolate(
            self.images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
        return replace(self, images=resized.clamp(0.0, 1.0))

    def with_channels(self, channels: int) -> Self:
        """Grey images as three equal channels, or the luma (ITU-R BT.601) of colour ones.

        Raises:
            InvalidParameter: If ``channels`` is neither 1 nor 3.
            InvalidInput: If the images have neither 1 nor 3 channels.
        """
        if channels not in (1, 3):
            raise InvalidParameter(f"channels: expected 1 (grey) or 3 (colour); got {channels}.")
        if self.channels == channels:
            return self
        if self.channels not in (1, 3):
            raise InvalidInput(
                f"{self.name}: images of {self.channels} channels are neither grey nor RGB, so "
                f"they cannot be given {channels}."
            )
        if channels == 3:
            images, note = self.images.repeat(1, 3, 1, 1), "grey images became 3 equal channels"
        else:
            luma = self.images.new_tensor(LUMA).view(1, 3, 1, 1)
            images = (self.images * luma).sum(1, keepdim=True).clamp(0.0, 1.0)
            note = "colour images became grey by their luma"
        return replace(self, images=images, notes=(*self.notes, f"{self.name}: {note}"))

    def fingerprint(self) -> str:
        """SHA-256 over shapes, pixels, labels and class names, not over name and notes."""
        digest = hashlib.sha256()
        header = {"shape": list(self.images.shape), "classes": list(self.classes)}
        digest.update(json.dumps(header, sort_keys=True).encode())
        digest.update(self.images.detach().cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _check_images(images: Tensor, name: str) -> None:
    if not isinstance(images, Tensor):
        raise InvalidInput(f"{name}: images must be a tensor; got {type(images).__name__}.")
    if images.ndim != 4:
        raise InvalidInput(
            f"{name}: images must have shape (N, C, H, W); got {tuple(images.shape)}."
            + (" Add a batch dimension with images[None]." if images.ndim == 3 else "")
        )
    if images.dtype != torch.float32:
        raise InvalidInput(
            f"{name}: images must be float32 in [0, 1]; got {images.dtype}."
            + (" Divide bytes by 255." if images.dtype == torch.uint8 else "")
        )
    if images.numel() == 0:
        if 0 in images.shape[1:]:
            raise InvalidInput(f"{name}: images of {tuple(images.shape[1:])} hold no pixel.")
        return
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).sum())
        raise InvalidInput(f"{name}: images hold {bad} values that are not finite.")
    low, high = float(images.min()), float(images.max())
    if low < 0.0 or high > 1.0:
        raise InvalidInput(
            f"{name}: pixels must lie in [0, 1]; got {low:g} to {high:g}."
            + (" Divide by 255." if low >= 0 and 1 < high <= 255 else " Undo the normalisation.")
        )


def _check_labels(labels: Tensor, count: int, classes: Sequence[str], name: str) -> None:
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.dtype == torch.float32:
        if labels.shape != (count, len(classes)):
            raise InvalidInput(
                f"{name}: {count} images of {len(classes)} classes came with targets of shape "
                f"{tuple(labels.shape)}; expected ({count}, {len(classes)})."
            )
        if not bool(torch.isfinite(labels).all()):
            raise InvalidInput(f"{name}: targets hold values that are not finite.")
        return
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        got = (
            f"{labels.dtype} of shape {tuple(labels.shape)}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise InvalidInput(f"{name}: labels must be an int64 tensor of shape (N,); got {got}.")
    if len(labels) != count:
        raise InvalidInput(f"{name}: {count} images came with {len(labels)} labels.")
    if not classes:
        raise InvalidInput(f"{name}: a set needs at least one class name.")
    if count and (int(labels.min()) < 0 or int(labels.max()) >= len(classes)):
        outside = labels[(labels < 0) | (labels >= len(classes))]
        raise InvalidInput(
            f"{name}: labels must lie in [0, {len(classes) - 1}] ({len(classes)} classes); "
            f"got {int(outside[0])}."
        )
