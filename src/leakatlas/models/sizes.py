"""Whether a model takes images of a shape, and which it would take instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from leakatlas.devices import CPU
from leakatlas.errors import InvalidInput
from leakatlas.models.structure import in_mode

REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What networks raise at an input that is not theirs: torchvision and timm assert its size."""

SIDES = (224, 32, 64, 28, 96, 128, 256, 299, 384, 16, 8)
"""Sides of images that networks are built for, the most usual first."""


def require_readable(
    model: nn.Module, shape: Sequence[int], device: torch.device = CPU, *, known: bool = True
) -> None:
    """Refuse images that a model cannot take, with those that it takes.

    Args:
        model: Called in eval mode on an image of zeros: it must remember no victim.
        shape: ``(C, H, W)`` of one image.
        device: Where the model is.
        known: Whether the images are at hand; otherwise only their shape was said.

    Raises:
        InvalidInput: If the model refuses them, or makes several rows of one image.
    """
    refusal = _refusal(model, shape, device)
    if not refusal:
        return
    fitting = next((s for s in _others(shape) if not _refusal(model, s, device)), None)
    meant = (
        "It must take one tensor of images: put a model of several inputs into a module that fixes "
        "the others, or change the images: "
        if fitting is None
        else f"It reads {(1, *fitting)}: "
    )
    raise InvalidInput(
        f"{type(model).__name__} cannot read inputs of shape {(1, *shape)}: {refusal}. {meant}"
        f"{_way(shape, fitting) if known else 'data.shape in YAML, input_shape= in Python'}."
    )


def _way(shape: Sequence[int], fitting: Sequence[int] | None) -> str:
    """How images of one shape become those of another, or of any where it is not known."""
    ways = []
    if fitting is None or fitting[1:] != tuple(shape[1:]):
        side = "SIZE" if fitting is None else fitting[1]
        ways.append(
            f"folder:PATH@{side}, parquet:PATH@{side} or photos:{side} (in Python "
            "ImageSet.resize) gives them that size"
        )
    if fitting is None or fitting[0] != shape[0]:
        ways.append(
            "data.channels in YAML, or ImageSet.with_channels, makes grey images of colour ones, "
            "and back"
        )
    return "; ".join(ways)


def _refusal(model: nn.Module, shape: Sequence[int], device: torch.device) -> str:
    """Why a model does not take an image of this shape, in its own words; empty if it does."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    zeros = torch.zeros(1, *shape, dtype=dtype).to(device)
    try:
        with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = model(zeros)
    except REFUSALS as problem:
        return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".!")
    if isinstance(found, Tensor) and found.dim() == 2 and len(found) != 1:
        return f"it makes {len(found)} rows of one image"
    return ""


def _others(shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Other shapes to try: the size alone or the channels alone is wrong more often than both."""
    channels, height, width = shape
    yield from ((channels, side, side) for side in SIDES)
    yield from ((other, height, width) for other in (3, 1) if other != channels)
    yield from ((other, side, side) for other in (3, 1) if other != channels for side in SIDES)
