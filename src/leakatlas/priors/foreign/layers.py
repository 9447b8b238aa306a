"""Any generator that is a stack of torch's own layers, written out in the recipe.

::

    latent: [100]
    layers:
      - Unflatten: {dim: 1, unflattened_size: [100, 1, 1]}
      - ConvTranspose2d: {in_channels: 100, out_channels: 512, kernel_size: 4, bias: false}
      - BatchNorm2d: {num_features: 512}
      - ReLU
      ...
      - Tanh
    prefix: main.
    signed: true
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from leakatlas.errors import UnknownName
from leakatlas.models import Card
from leakatlas.priors.foreign.kind import LAYERS, Kind, Pixels, drawn_shape, filled, in_pixels
from leakatlas.priors.prior import Part, Prior, alone

TAKEN = (
    "BatchNorm1d", "BatchNorm2d", "Conv2d", "ConvTranspose2d", "ELU", "Flatten", "GELU",
    "GroupNorm", "Identity", "InstanceNorm2d", "LayerNorm", "LeakyReLU", "Linear", "PixelShuffle",
    "ReLU", "Sigmoid", "SiLU", "Softplus", "Tanh", "Unflatten", "Upsample",
)  # fmt: skip
"""Layers of ``torch.nn`` that a recipe may name."""

MAPS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers at which a new stage begins."""

Side = Annotated[int, Field(strict=True, gt=0, le=2**16)]

Layer = str | Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1)]
"""A name, or a name with settings."""


class LayersRecipe(Kind):
    """A sequence of layers, from a latent to an image."""

    kind: Literal["layers"]
    latent: Annotated[list[Side], Field(min_length=1, max_length=3)]
    layers: Annotated[list[Layer], Field(min_length=1, max_length=LAYERS)]
    prefix: Annotated[str, Field(description="What stands before the numbers of the layers.")] = ""
    signed: Annotated[bool, Field(description="Whether it draws in [-1, 1], not [0, 1].")] = False

    def build(self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str) -> Prior:
        """The stack."""
        del folder
        held = {n.removeprefix(self.prefix): t for n, t in state.items()}
        stack = filled(lambda: nn.Sequential(*map(_layer, self.layers)), held, who)
        network = Pixels(stack) if self.signed else stack
        latent = tuple(self.latent)
        stages = _stages(stack)
        return Prior(
            network, card, latent, drawn_shape(network, latent, who),
            stages=in_pixels(stages) if self.signed else stages,
        )  # fmt: skip


def _stages(stack: nn.Module) -> tuple[Part, ...]:
    """A stage from each layer with a map of its own up to the next."""
    layers = list(stack.children())
    starts = [k for k, layer in enumerate(layers) if isinstance(layer, MAPS)][1:]
    ends = [*starts, len(layers)]
    return tuple(
        alone(nn.Sequential(*layers[a:b])) for a, b in zip([0, *starts], ends, strict=True)
    )


def _layer(written: Layer) -> nn.Module:
    name, settings = (written, {}) if isinstance(written, str) else next(iter(written.items()))
    if name not in TAKEN:
        raise UnknownName("layer of a prior", name, TAKEN)
    if "unflattened_size" in settings:
        settings = {**settings, "unflattened_size": tuple(settings["unflattened_size"])}
    made: nn.Module = getattr(nn, name)(**settings)
    return made
