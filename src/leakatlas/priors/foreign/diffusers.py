"""Models of the package diffusers from local folders: UNet2DModel and AutoencoderKL."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from leakatlas import reading, sealed
from leakatlas.errors import InvalidInput, needing, shown
from leakatlas.models import Card
from leakatlas.priors.foreign.kind import (
    LAYERS,
    FileName,
    Kind,
    Pixels,
    drawn_shape,
    filled,
    in_pixels,
)
from leakatlas.priors.prior import Diffusion, Part, Prior, alone

LARGEST = 2**16
"""No count, width or side in a configuration is larger."""


class UNetRecipe(Kind):
    """A noise-predicting UNet2DModel with its scheduler, laid out as a pipeline's folder."""

    kind: Literal["unet2d"]
    weights: FileName = "unet/diffusion_pytorch_model.safetensors"
    config: FileName = "unet/config.json"
    scheduler: FileName = "scheduler/scheduler_config.json"

    def build(self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str) -> Diffusion:
        """The denoiser and its schedule."""
        network, config = _model("UNet2DModel", folder / self.config, state, who)
        scheduler = _schedule(folder / self.scheduler, who)
        size, channels = config.get("sample_size"), config.get("in_channels", 3)
        if not isinstance(size, int) or channels not in (1, 3):
            raise InvalidInput(
                f"{who}: a square image of one or three channels was expected; sample_size is "
                f"{shown(size)}, in_channels {shown(channels)}."
            )
        return Diffusion(Noise(network), card, (channels, size, size), scheduler)


class AutoencoderRecipe(Kind):
    """The decoder of an AutoencoderKL; latents are standard normal after its scaling."""

    kind: Literal["autoencoder_kl"]
    weights: FileName = "diffusion_pytorch_model.safetensors"
    config: FileName = "config.json"
    size: Annotated[int, Field(strict=True, ge=8, le=2**12, description="Side of its images.")]

    def build(self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str) -> Prior:
        """The decoder."""
        network, config = _model("AutoencoderKL", folder / self.config, state, who)
        blocks, channels = config.get("block_out_channels", (64,)), config.get("latent_channels", 4)
        if not isinstance(blocks, list | tuple) or not isinstance(channels, int):
            raise InvalidInput(f"{who}: block_out_channels or latent_channels cannot be read.")
        halvings = 2 ** (len(blocks) - 1)
        if self.size % halvings:
            raise InvalidInput(f"{who}: its images have sides that are multiples of {halvings}.")
        scale = config.get("scaling_factor", 0.18215)
        if not isinstance(scale, float | int) or not scale > 0:
            raise InvalidInput(f"{who}: scaling_factor is {shown(scale)}.")
        side = self.size // halvings
        decoding = Decoding(network, float(scale))
        pixels, latent = Pixels(decoding), (channels, side, side)
        shape = drawn_shape(pixels, latent, who)
        return Prior(pixels, card, latent, shape, stages=in_pixels(decoding.stages()))


class Noise(nn.Module):
    """What a UNet2DModel predicts, as a tensor.

    Args:
        network: The model.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise in ``x``."""
        noise: Tensor = self.network(x, t).sample
        return noise


class Decoding(nn.Module):
    """The decoder's half of an AutoencoderKL.

    Args:
        network: The whole.
        scale: By which its latents were multiplied for diffusion.
    """

    def __init__(self, network: Any, scale: float) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = network.post_quant_conv, network.decoder
        self.scale = scale

    def forward(self, z: Tensor) -> Tensor:
        """Images of [-1, 1]."""
        drawn: Tensor = self.decoder(self._unscaled(z))
        return drawn

    def _unscaled(self, z: Tensor) -> Tensor:
        h = z / self.scale
        if self.post_quant_conv is not None:
            h = self.post_quant_conv(h)
        return h

    def stages(self) -> tuple[Part, ...]:
        """The middle of the decoder, each block behind it, and what makes pixels of the last."""
        blocks: Any = self.decoder.up_blocks
        return (self._begin, *(alone(block) for block in blocks), self._end)

    def _begin(self, z: Tensor) -> tuple[Tensor]:
        whole: Any = self.decoder
        return (whole.mid_block(whole.conv_in(self._unscaled(z))),)

    def _end(self, h: Tensor) -> tuple[Tensor]:
        whole: Any = self.decoder
        return (whole.conv_out(whole.conv_act(whole.conv_norm_out(h))),)


def _model(
    name: str, file: Path, state: Mapping[str, Tensor], who: str
) -> tuple[nn.Module, dict[str, Any]]:
    library = _library()
    config = _config(file, who, expected=name)
    make = functools.partial(getattr(library, name).from_config, config)
    return filled(make, state, who), config


def _schedule(file: Path, who: str) -> Tensor:
    """``(T,)`` shares of variance that are left."""
    config = _config(file, who)
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise InvalidInput(
            f"{who} predicts {shown(config['prediction_type'])}; a model that predicts the noise "
            "(epsilon) was expected."
        )
    try:
        scheduler = _library().DDPMScheduler.from_config(config)
    # What the package says of settings that it cannot take.
    except sealed.MALFORMED as problem:
        raise InvalidInput(f"{who}: its scheduler cannot be built: {problem}.") from None
    kept: Tensor = scheduler.alphas_cumprod
    return kept.double()


def _library() -> Any:
    with needing("a prior of diffusers", "leakatlas[diffusers]"):
        return importlib.import_module("diffusers")


def _config(file: Path, who: str, *, expected: str = "") -> dict[str, Any]:
    values = reading.read_json(file, what="configuration of diffusers")
    if not isinstance(values, dict):
        raise InvalidInput(f"{who}: {file.name} holds no settings by name.")
    if expected and values.get("_class_name") != expected:
        raise InvalidInput(
            f"{who}: {file.name} describes {shown(values.get('_class_name'))}; expected {expected}."
        )
    _require_bounds(values, who)
    return values


def _require_bounds(value: object, who: str) -> None:
    if isinstance(value, dict | list):
        if len(value) > LAYERS:
            raise InvalidInput(f"{who}: a configuration with lists of {len(value):,} values.")
        for inner in value.values() if isinstance(value, dict) else value:
            _require_bounds(inner, who)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise InvalidInput(f"{who}: {value:,} in its configuration is larger than {LARGEST:,}.")
