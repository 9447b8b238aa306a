"""What the model families share: seeded construction, activations, normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import gcd
from typing import Literal

import torch
from torch import nn

from leakatlas.errors import InvalidParameter, UnknownName

Norm = Literal["none", "batch", "group", "instance"]
Activation = Literal[
    "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "elu", "softplus", "identity"
]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),  # R-GAP's slope; PyTorch's 0.01 inverts badly
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside the block; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also reseed every accelerator, which devices=[]
        # does not restore.
        torch.default_generator.manual_seed(seed)
        yield


def activation(name: str) -> nn.Module:
    """A fresh activation layer.

    Raises:
        UnknownName: If there is no activation of that name.
    """
    if name not in _ACTIVATIONS:
        raise UnknownName("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


def norm2d(name: str, channels: int) -> nn.Module:
    """A fresh normalisation layer for ``(N, channels, H, W)``; "none" is the identity.

    Raises:
        UnknownName: If there is no normalisation of that name.
    """
    if name == "none":
        return nn.Identity()
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "group":
        return nn.GroupNorm(gcd(channels, 8), channels)
    if name == "instance":
        return nn.GroupNorm(channels, channels)
    raise UnknownName("normalisation", name, ("none", "batch", "group", "instance"))


def require_positive(model: str, **values: int) -> None:
    """Refuse a size, a count or a width that is not a positive integer.

    Raises:
        InvalidParameter: Naming the model and the first such argument.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidParameter(f"{model}({name}={value!r}): expected a positive integer.")


def require_rate(model: str, dropout: float) -> None:
    """Refuse a dropout rate outside [0, 1).

    Raises:
        InvalidParameter: Naming the model and what it takes.
    """
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InvalidParameter(f"{model}(dropout={dropout!r}): expected a rate in [0, 1).")


def require_size(model: str, size: int, *, at_least: int = 1, multiple_of: int = 1) -> None:
    """Refuse an image side that the architecture cannot take.

    Raises:
        InvalidParameter: Naming the model and what it takes.
    """
    require_positive(model, size=size)
    if size < at_least or size % multiple_of:
        wanted = f"at least {at_least}" + (
            f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
        )
        raise InvalidParameter(f"{model}(size={size}): the image side must be {wanted}.")
