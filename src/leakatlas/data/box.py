"""The pixel space: how images in [0, 1] become the numbers that a model sees, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput, InvalidParameter


@dataclass(frozen=True)
class Box:
    """A per-channel normalisation ``(pixel - mean) / std`` and the range of valid pixels.

    Args:
        mean: Mean of each channel, in pixels of [0, 1].
        std: Standard deviation of each channel, in pixels of [0, 1]; positive.
        low: Smallest valid pixel before normalisation.
        high: Largest valid pixel before normalisation.

    Raises:
        InvalidParameter: If the lengths differ, a std is not positive, a value is not finite, or
            ``low >= high``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        try:
            mean = tuple(float(value) for value in self.mean)
            std = tuple(float(value) for value in self.std)
            low, high = float(self.low), float(self.high)
        except (TypeError, ValueError):
            raise InvalidParameter(
                f"Box needs numbers: a mean and a std per channel, low and high; got "
                f"mean={self.mean!r}, std={self.std!r}, low={self.low!r}, high={self.high!r}."
            ) from None
        if not mean or len(mean) != len(std):
            raise InvalidParameter(
                f"Box needs one mean and one std for each channel; got {len(mean)} means and "
                f"{len(std)} stds."
            )
        if not all(map(math.isfinite, (*mean, *std, low, high))):
            raise InvalidParameter(f"Box needs finite values; got mean={mean}, std={std}.")
        if min(std) <= 0:
            raise InvalidParameter(f"Box needs positive stds; got {std}.")
        if low >= high:
            raise InvalidParameter(f"Box needs low < high; got low={low}, high={high}.")
        for name, value in (("mean", mean), ("std", std), ("low", low), ("high", high)):
            object.__setattr__(self, name, value)

    @classmethod
    def unit(cls, channels: int) -> Self:
        """The box of a model that reads plain pixels of [0, 1]."""
        return cls(mean=(0.0,) * channels, std=(1.0,) * channels)

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return len(self.mean)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in pixels, ``(..., C, H, W)``, in the space that the model sees."""
        mean, std = self._columns(images)
        return (images - mean) / std

    def denormalize(self, x: Tensor) -> Tensor:
        """Model-space ``x``, ``(..., C, H, W)``, back in pixels; not clipped."""
        mean, std = self._columns(x)
        return x * std + mean

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest valid value in model space, each ``(C, 1, 1)``."""
        mean, std = self._columns(like)
        return (self.low - mean) / std, (self.high - mean) / std

    def clip(self, x: Tensor) -> Tensor:
        """The nearest point of the box to the model-space ``x``, ``(..., C, H, W)``."""
        low, high = self.bounds(x)
        return torch.clamp(x, min=low, max=high)

    def contains(self, x: Tensor, *, tolerance: float = 1e-6) -> bool:
        """Whether every value of the model-space ``x`` is a valid pixel up to ``tolerance``."""
        low, high = self.bounds(x)
        return bool(((x >= low - tolerance) & (x <= high + tolerance)).all())

    def to_json(self) -> dict[str, Any]:
        """The box as plain JSON values."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "low": self.low,
            "high": self.high,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The box whose :meth:`to_json` is ``values``.

        Raises:
            InvalidParameter: If a key is missing, unknown or of the wrong type.
        """
        expected = {"mean", "std", "low", "high"}
        unknown, missing = sorted(set(values) - expected), sorted({"mean", "std"} - set(values))
        if unknown or missing:
            raise InvalidParameter(
                f"A Box in JSON has the keys mean, std, low, high; "
                f"unknown: {unknown or 'none'}, missing: {missing or 'none'}."
            )
        mean, std = values["mean"], values["std"]
        for name, value in (("mean", mean), ("std", std)):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise InvalidParameter(f"Box {name} is a list of numbers; got {value!r}.")
        return cls(tuple(mean), tuple(std), values.get("low", 0.0), values.get("high", 1.0))

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim < 3 or x.shape[-3] != self.channels:
            raise InvalidInput(
                f"This Box has {self.channels} channels and expects (..., {self.channels}, H, W); "
                f"got a tensor of shape {tuple(x.shape)}."
            )
        shape = (self.channels, 1, 1)
        return x.new_tensor(self.mean).view(shape), x.new_tensor(self.std).view(shape)


CIFAR10 = Box(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
"""Channel statistics of the CIFAR-10 training images (the values in common use)."""

IMAGENET = Box(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Channel statistics of ImageNet as torchvision's models expect them."""
