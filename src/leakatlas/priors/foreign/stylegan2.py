r"""StyleGAN2 (Karras et al., 2020), under the names of the PyTorch port, as safetensors.

A mapping network turns z into a style w, of which every convolution takes a copy (together, w+).
Its weights are scaled by an affine function of w and normalised for each output,

.. math:: w'_{oik} = s_i w_{oik}, \qquad
          w''_{oik} = w'_{oik} \Big/ \sqrt{\textstyle\sum_{ik} {w'_{oik}}^2 + 10^{-8}},

and the image is the sum of what each resolution adds to the enlarged image of the one before. Size
and widths follow from the weights. The noise is the one that is kept with them, so that a latent
draws one image.

The weights that NVIDIA published may not be redistributed nor used commercially; this only reads
what a user has converted. Names: ``style.1.weight``, ``convs.0.conv.weight`` and so on, after a
``g_ema.`` that is dropped.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.errors import InvalidInput
from leakatlas.models import Card
from leakatlas.priors.foreign.kind import Kind, Pixels, drawn_shape, filled, in_pixels
from leakatlas.priors.prior import Part, Prior, through

FILTER = (1.0, 3.0, 3.0, 1.0)
"""The separable low-pass filter behind every enlargement."""
MAPPING_RATE = 0.01
"""Factor on the weights of the mapping network at run time."""


class StyleGAN2Recipe(Kind):
    """Weights alone: they say the rest."""

    kind: Literal["stylegan2"]

    def build(self, card: Card, folder: Path, state: Mapping[str, Tensor], who: str) -> Prior:
        """Mapping and synthesis; latents are z."""
        del folder
        held = {n.removeprefix("g_ema."): t for n, t in state.items()}
        try:
            widths, style, depth = _layout(held)
        except (KeyError, IndexError, ValueError) as problem:
            raise InvalidInput(
                f"{who} holds no StyleGAN2 under the names of the PyTorch port ({problem}); "
                "convert its g_ema to safetensors."
            ) from None
        network = filled(lambda: Synthesis(widths, style, depth), held, who)
        assert isinstance(network, Synthesis)
        pixels = Pixels(network)
        shape = drawn_shape(pixels, (style,), who)
        return Prior(pixels, card, (style,), shape, stages=in_pixels(network.stages()))


def _layout(state: Mapping[str, Tensor]) -> tuple[list[int], int, int]:
    """Widths of the resolutions from 4 on, length of a style, layers of the mapping."""
    depth = sum(n.startswith("style.") and n.endswith(".weight") for n in state)
    count = sum(n.startswith("convs.") and n.endswith(".conv.weight") for n in state)
    if not depth or count % 2:
        raise ValueError(f"{depth} layers of style, {count} convolutions")
    widths = [int(state["conv1.conv.weight"].shape[1])]
    widths += [int(state[f"convs.{k}.conv.weight"].shape[1]) for k in range(0, count, 2)]
    return widths, int(state["style.1.weight"].shape[0]), depth


class Synthesis(nn.Module):
    """Images ``(N, 3, S, S)`` around [-1, 1] of latents ``(N, style)``.

    Args:
        widths: Feature maps of each resolution, from 4 x 4 on.
        style: Length of z and of a style.
        depth: Layers of the mapping network.
    """

    def __init__(self, widths: list[int], style: int, depth: int) -> None:
        super().__init__()
        mapping = [Scaled(style, style, rate=MAPPING_RATE, active=True) for _ in range(depth)]
        self.style = nn.Sequential(Normalised(), *mapping)
        self.input = Constant(widths[0])
        self.conv1 = Styled(widths[0], widths[0], style)
        self.to_rgb1 = ToImage(widths[0], style)
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(
            layer
            for coarse, fine in pairs
            for layer in (Styled(coarse, fine, style, enlarge=True), Styled(fine, fine, style))
        )
        self.to_rgbs = nn.ModuleList(ToImage(fine, style, enlarge=True) for _, fine in pairs)
        self.noises = nn.Module()
        for number in range(2 * len(widths) - 1):
            side = 2 ** ((number + 5) // 2)
            self.noises.register_buffer(f"noise_{number}", torch.zeros(1, 1, side, side))

    def forward(self, z: Tensor) -> Tensor:
        """The images."""
        return through(self.stages(), z)

    def stages(self) -> tuple[Part, ...]:
        """Latent to styles, styles to 4 x 4, each doubling of the side, features to the image.

        Beside the feature go the styles ``(N, 2 R, style)`` of all R resolutions and, after the
        first, the image that the coarser ones make.
        """
        doublings = [functools.partial(self._finer, level) for level in range(len(self.to_rgbs))]
        return (self._styles, self._coarsest, *doublings, self._finest)

    def _styles(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.style(z)[:, None].repeat(1, 2 * len(self.to_rgbs) + 2, 1),)

    def _coarsest(self, w: Tensor) -> tuple[Tensor, ...]:
        start = self.input.input.expand(len(w), -1, -1, -1)
        return self.conv1(start, w[:, 0], self._noise(0)), w

    def _finer(
        self, level: int, h: Tensor, w: Tensor, coarse: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        image = self._image(level, h, w, coarse)
        for k in (2 * level, 2 * level + 1):
            h = self.convs[k](h, w[:, k + 1], self._noise(k + 1))
        return h, w, image

    def _finest(self, h: Tensor, w: Tensor, coarse: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self._image(len(self.to_rgbs), h, w, coarse),)

    def _image(self, level: int, h: Tensor, w: Tensor, coarse: Tensor | None) -> Tensor:
        to_image = self.to_rgbs[level - 1] if level else self.to_rgb1
        # The next convolution takes the same style.
        image: Tensor = to_image(h, w[:, 2 * level + 1], coarse)
        return image

    def _noise(self, number: int) -> Tensor:
        return self.noises.get_buffer(f"noise_{number}")


class Normalised(nn.Module):
    """Latents of unit mean square."""

    def forward(self, z: Tensor) -> Tensor:
        """``z`` over its root mean square."""
        return z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class Constant(nn.Module):
    """What the synthesis starts from.

    Args:
        width: Feature maps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.zeros(1, width, 4, 4))


class Scaled(nn.Module):
    """A linear layer whose weights are scaled at run time.

    Args:
        wide: Inputs.
        out: Outputs.
        rate: Factor on weights and biases.
        active: Whether a leaky rectifier follows.
    """

    def __init__(self, wide: int, out: int, *, rate: float = 1.0, active: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(out, wide)),
            nn.Parameter(torch.zeros(out)),
        )
        self.scale, self.rate, self.active = rate / math.sqrt(wide), rate, active

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        h = F.linear(x, self.weight * self.scale, self.bias * self.rate)
        return rectified(h) if self.active else h


class Modulated(nn.Module):
    """A convolution whose weights depend on the style.

    Args:
        wide: Feature maps that come in.
        out: Feature maps that go out.
        kernel: Side of the kernel.
        style: Length of a style.
        enlarge: Whether the side is doubled.
        normalise: Whether outputs are brought to unit variance.
    """

    def __init__(
        self, wide: int, out: int, kernel: int, style: int, *, enlarge: bool, normalise: bool
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, out, wide, kernel, kernel))
        self.modulation = Scaled(style, wide)
        self.scale = 1 / math.sqrt(wide * kernel * kernel)
        self.enlarge, self.normalise, self.padding = enlarge, normalise, kernel // 2
        if enlarge:
            self.blur = LowPass()

    def forward(self, h: Tensor, w: Tensor) -> Tensor:
        """``(N, out, S, S)``, or twice the side."""
        N, wide, height, width = h.shape
        weight = self.scale * self.weight * self.modulation(w)[:, None, :, None, None]
        if self.normalise:
            weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        # One group an example: each has weights of its own.
        h = h.reshape(1, N * wide, height, width)
        if self.enlarge:
            apart = weight.transpose(1, 2).flatten(0, 1)
            h = F.conv_transpose2d(h, apart, stride=2, groups=N)
            return filtered(h.reshape(N, -1, *h.shape[2:]), self.blur.kernel, (1, 1))
        h = F.conv2d(h, weight.flatten(0, 1), padding=self.padding, groups=N)
        return h.reshape(N, -1, height, width)


class LowPass(nn.Module):
    """The filter that an enlargement keeps beside its weights, ``(4, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor(FILTER)
        self.register_buffer("kernel", 4 * torch.outer(line, line) / line.sum() ** 2)
        self.kernel: Tensor


class Noisy(nn.Module):
    """A noise of the picture's size, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Bias(nn.Module):
    """A bias for each feature map.

    Args:
        width: Feature maps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


class Styled(nn.Module):
    """A convolution with style, noise and a leaky rectifier.

    Args:
        wide: Feature maps that come in.
        out: Feature maps that go out.
        style: Length of a style.
        enlarge: Whether the side is doubled.
    """

    def __init__(self, wide: int, out: int, style: int, *, enlarge: bool = False) -> None:
        super().__init__()
        self.conv = Modulated(wide, out, 3, style, enlarge=enlarge, normalise=True)
        self.noise, self.activate = Noisy(), Bias(out)

    def forward(self, h: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """The features that follow."""
        h = self.conv(h, w) + self.noise.weight * noise
        return rectified(h + self.activate.bias[:, None, None])


class ToImage(nn.Module):
    """What a resolution adds to the image.

    Args:
        wide: Feature maps that come in.
        style: Length of a style.
        enlarge: Whether there is a coarser image, of half the side.
    """

    def __init__(self, wide: int, style: int, *, enlarge: bool = False) -> None:
        super().__init__()
        if enlarge:
            self.upsample = LowPass()
        self.conv = Modulated(wide, 3, 1, style, enlarge=False, normalise=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, h: Tensor, w: Tensor, coarse: Tensor | None) -> Tensor:
        """The image so far."""
        image: Tensor = self.conv(h, w) + self.bias
        return image if coarse is None else image + enlarged(coarse, self.upsample.kernel)


def rectified(h: Tensor) -> Tensor:
    """A leaky rectifier that keeps the variance."""
    return math.sqrt(2) * F.leaky_relu(h, 0.2)


def filtered(h: Tensor, kernel: Tensor, pad: tuple[int, int]) -> Tensor:
    """Every feature map convolved with a kernel, after zeros before and behind."""
    maps = h.shape[1]
    h = F.pad(h, (pad[0], pad[1], pad[0], pad[1]))
    each = kernel.flip(0, 1)[None, None].expand(maps, 1, -1, -1)
    return F.conv2d(h, each.to(h), groups=maps)


def enlarged(image: Tensor, kernel: Tensor) -> Tensor:
    """Twice the side: zeros between the pixels, then the filter."""
    N, C, height, width = image.shape
    spread = F.pad(image.reshape(N, C, height, 1, width, 1), (0, 1, 0, 0, 0, 1))
    return filtered(spread.reshape(N, C, 2 * height, 2 * width), kernel, (2, 1))
