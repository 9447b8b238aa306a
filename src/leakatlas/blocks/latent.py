"""Searches inside a generator: over its latents, over its weights, and how its pixels are fitted.

A generator here is any module that maps latents ``(N, ...)`` to pixels of [0, 1]; which one it is,
where it comes from and what it was learned on is the business of :mod:`leakatlas.priors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas.blocks import descent
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import InvalidInput

Images = Callable[[Tensor], Tensor]
"""Pixels of [0, 1] at the generator's size to model space at the client's size."""


def search_latent(
    decode: Callable[[Tensor], Tensor],
    start: Tensor,
    value: Callable[[Tensor], descent.Value],
    *,
    steps: int,
    lr: float,
    watch: Watch,
    weight: float = 0.0,
    schedule: Callable[[float], float] | None = None,
    after: tuple[descent.Hook, ...] = (),
) -> descent.Descended:
    """Adam on R latent batches, each with its own best.

    Args:
        decode: Latents ``(N, ...)`` to pixels.
        start: ``(R, N, ...)``.
        value: Objective and criterion of pixels ``(N, C, H, W)``.
        steps: Iterations.
        lr: Step size.
        watch: Budget and progress.
        weight: Weight of the mean squared latent.
        schedule: Of the step size.
        after: Hooks on the variable ``z`` after every step.
    """

    def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
        del t
        z = variables["z"]
        total, criterion = value(decode(z))
        return descent.Value(total + weight * z.square().mean(), criterion)

    return descent.descend(
        objective,
        {"z": start},
        candidates=len(start),
        optimizer=descent.adam(lr),
        steps=steps,
        watch=watch,
        schedule=schedule,
        after=after,
    )


def search_weights(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    value: Callable[[Tensor], descent.Value],
    *,
    steps: int,
    lr: float,
    watch: Watch,
    schedule: Callable[[float], float] | None = None,
) -> descent.Descended:
    """Adam on one copy of a network's weights for each of the fixed inputs.

    Args:
        network: Gives the architecture and the weights to start from; not changed.
        inputs: Each ``(N, ...)``; not changed.
        value: Objective and criterion of pixels ``(N, C, H, W)``.
        steps: Iterations.
        lr: Step size.
        watch: Budget and progress.
        schedule: Of the step size.
    """

    def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
        del t
        return value(drawn(network, variables, inputs))

    return descent.descend(
        objective,
        copies(network, len(inputs[0])),
        optimizer=descent.adam(lr),
        steps=steps,
        watch=watch,
        schedule=schedule,
    )


def copies(network: nn.Module, count: int) -> dict[str, Tensor]:
    """The weights of a network by name, ``count`` times along a new first dimension."""
    return {n: p.detach().expand(count, *p.shape).clone() for n, p in network.named_parameters()}


def drawn(network: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """Image i of inputs i by the network with the weights i of each stack."""
    return torch.cat(
        [
            functional_call(
                network,
                {n: stack[i] for n, stack in weights.items()},
                tuple(given[i : i + 1] for given in inputs),
            )
            for i in range(len(inputs[0]))
        ]
    )


def to_model_space(shape: tuple[int, ...], box: Box) -> Images:
    """How generated pixels become inputs of the client's model.

    Larger images are averaged down, smaller ones interpolated; colours become grey by their mean
    where the client's images have one channel, and grey is repeated where they have several.

    Args:
        shape: ``(C, H, W)`` of the client's images.
        box: Their pixel space.

    Raises:
        InvalidInput: If ``shape`` is no image.
    """
    if len(shape) != 3:
        raise InvalidInput(
            f"A generator draws images (C, H, W); the model takes inputs of shape {shape}."
        )
    channels, height, width = shape

    def convert(pixels: Tensor) -> Tensor:
        if pixels.shape[1] != channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        if pixels.shape[2:] != (height, width):
            smaller = height <= pixels.shape[2] and width <= pixels.shape[3]
            pixels = F.interpolate(
                pixels, size=(height, width), mode="area" if smaller else "bilinear"
            )
        return box.normalize(pixels)

    return convert
