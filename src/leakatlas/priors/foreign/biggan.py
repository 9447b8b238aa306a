"""BigGAN-deep (Brock et al., 2019), by the module of the package pytorch-pretrained-biggan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import reading
from leakatlas.catalogue.schema import Strict
from leakatlas.errors import InvalidInput, needing
from leakatlas.models import Card
from leakatlas.priors.foreign.kind import (
    LAYERS,
    FileName,
    Kind,
    Pixels,
    checked,
    drawn_shape,
    filled,
)
from leakatlas.priors.prior import Prior

Count = Annotated[int, Field(strict=True, gt=0, le=2**16)]


class Config(Strict):
    """``config.json`` of the package."""

    output_dim: Count
    z_dim: Count
    class_embed_dim: Count
    channel_width: Count
    num_classes: Count
    layers: Annotated[list[tuple[bool, Count, Count]], Field(min_length=1, max_length=LAYERS)]
    attention_layer_position: Annotated[int, Field(strict=True, ge=0)]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    n_stats: Annotated[int, Field(strict=True, ge=2, le=2**12)]


class BigGANRecipe(Kind):
    """Weights and ``config.json``.

    Latents are standard normal times ``truncation``; labels are those of its training, or one that
    is fixed, which makes it an unconditional prior of that class.
    """

    kind: Literal["biggan"]
    config: FileName = "config.json"
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0
    label: Annotated[int | None, Field(strict=True, ge=0)] = None

    def build(self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str) -> Prior:
        """The generator."""
        with needing("a BigGAN prior", "leakatlas[biggan]"):
            from pytorch_pretrained_biggan import BigGAN, BigGANConfig

        values = reading.read_json(folder / self.config, what="configuration of a BigGAN")
        config = checked(Config, values, who)
        if self.label is not None and self.label >= config.num_classes:
            raise InvalidInput(f"{who}: label {self.label} of {config.num_classes} classes.")
        network = filled(lambda: BigGAN(BigGANConfig.from_dict(config.model_dump())), state, who)
        told = Conditional(network, config.num_classes, self.truncation, self.label)
        pixels = Pixels(told)
        y = () if self.label is not None else (torch.zeros(1, dtype=torch.int64),)
        shape = drawn_shape(pixels, (config.z_dim,), who, *y)
        classes = config.num_classes if self.label is None else 0
        return Prior(pixels, card, (config.z_dim,), shape, classes)


class Conditional(nn.Module):
    """A BigGAN that takes labels as numbers.

    Args:
        network: Takes latents, one-hot labels and the truncation.
        classes: Number of labels.
        truncation: Scale of the latents.
        label: The only label, if it is fixed.
    """

    def __init__(
        self, network: nn.Module, classes: int, truncation: float, label: int | None
    ) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        self.truncation, self.label = truncation, label

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images of [-1, 1]."""
        if y is None:
            assert self.label is not None
            y = torch.full((len(z),), self.label, device=z.device)
        told = F.one_hot(y, self.classes).to(z)
        drawn: Tensor = self.network(self.truncation * z, told, self.truncation)
        return drawn
