"""BigGAN-deep (Brock et al., 2019), by the module of the package pytorch-pretrained-biggan."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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
    in_pixels,
)
from leakatlas.priors.prior import Part, Prior

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
        return Prior(pixels, card, (config.z_dim,), shape, classes, in_pixels(told.stages()))


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
        drawn: Tensor = self.network(self.truncation * z, self._told(z, y), self.truncation)
        return drawn

    def _told(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Labels as the network takes them."""
        if y is None:
            assert self.label is not None
            y = torch.full((len(z),), self.label, device=z.device)
        return F.one_hot(y, self.classes).to(z)

    def stages(self) -> tuple[Part, ...]:
        """The linear map to 4 x 4, each block, and what makes pixels of the last.

        Beside the feature goes the vector that conditions every block: the latent, truncated, and
        the embedding of the label. Attention belongs to the block that follows it.
        """
        from pytorch_pretrained_biggan.model import GenBlock

        whole: Any = self.network.generator
        blocks: list[list[nn.Module]] = [[]]
        for layer in whole.layers:
            blocks[-1].append(layer)
            if isinstance(layer, GenBlock):
                blocks.append([])
        return (self._begin, *(functools.partial(self._block, b) for b in blocks[:-1]), self._end)

    def _begin(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        network: Any = self.network
        about = torch.cat((self.truncation * z, network.embeddings(self._told(z, y))), dim=1)
        h = network.generator.gen_z(about)
        # As TensorFlow, where the weights come from, lays features out: maps last.
        maps = h.shape[1] // 16
        return h.view(-1, 4, 4, maps).permute(0, 3, 1, 2).contiguous(), about

    def _block(self, layers: Sequence[nn.Module], h: Tensor, about: Tensor) -> tuple[Tensor, ...]:
        *attention, block = layers
        for layer in attention:
            h = layer(h)
        return block(h, about, self.truncation), about

    def _end(self, h: Tensor, about: Tensor) -> tuple[Tensor, ...]:
        del about
        whole: Any = self.network.generator
        h = whole.conv_to_rgb(whole.relu(whole.bn(h, self.truncation)))
        return (whole.tanh(h[:, :3]),)
