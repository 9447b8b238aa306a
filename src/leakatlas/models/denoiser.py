"""A small U-Net that predicts the noise in an image, for diffusion priors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.errors import InvalidParameter
from leakatlas.models.parts import norm2d, require_positive, require_size, seeded


class Denoiser(nn.Module):
    """The noise in ``(N, channels, size, size)`` at diffusion times ``(N,)``, of the same shape.

    One residual block a resolution on the way down, one in the middle, one on the way up, with
    skips between equal resolutions; GroupNorm, so that no image depends on another.

    Args:
        channels: Channels of an image.
        size: Side of an image.
        widths: Feature maps of each resolution, fine to coarse.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        size: int = 32,
        widths: Sequence[int] = (32, 64, 64),
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        if not widths:
            raise InvalidParameter("Denoiser(widths=()): expected at least one width.")
        require_positive("Denoiser", channels=channels)
        for width in widths:
            require_positive("Denoiser", widths=width)
        halvings = 2 ** (len(widths) - 1)
        require_size("Denoiser", size, at_least=halvings, multiple_of=halvings)
        self.channels, self.size, self.widths = channels, size, widths
        self.timed = 4 * widths[0]
        with seeded(seed):
            self.clock = nn.Sequential(
                nn.Linear(widths[0], self.timed), nn.SiLU(), nn.Linear(self.timed, self.timed)
            )
            self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
            previous = (widths[0], *widths[:-1])
            self.down = nn.ModuleList(
                [_Block(a, b, self.timed) for a, b in zip(previous, widths, strict=True)]
            )
            self.middle = _Block(widths[-1], widths[-1], self.timed)
            self.up = nn.ModuleList(
                [
                    _Block(2 * b, a, self.timed)
                    for a, b in zip(reversed(previous), reversed(widths), strict=True)
                ]
            )
            last = nn.Conv2d(widths[0], channels, 3, padding=1)
            nn.init.zeros_(last.weight)
            self.leave = nn.Sequential(norm2d("group", widths[0]), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The noise in ``x`` at times ``t`` ``(N,)``, whole numbers from 0."""
        told = self.clock(waves(t, self.timed // 4).to(x.dtype))
        h = self.enter(x)
        skips = []
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if level else h, told)
            skips.append(h)
        h = self.middle(h, told)
        for level, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], 1), told)
            if level < len(self.up) - 1:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
        noise: Tensor = self.leave(h)
        return noise


class _Block(nn.Module):
    """Two convolutions around a shift by the time, and a skip."""

    def __init__(self, wide: int, out: int, timed: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            norm2d("group", wide), nn.SiLU(), nn.Conv2d(wide, out, 3, padding=1)
        )
        self.shift = nn.Linear(timed, out)
        self.second = nn.Sequential(
            norm2d("group", out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip = nn.Identity() if wide == out else nn.Conv2d(wide, out, 1)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        inner = self.first(h) + self.shift(F.silu(told))[:, :, None, None]
        out: Tensor = self.skip(h) + self.second(inner)
        return out


def waves(t: Tensor, width: int) -> Tensor:
    """Sines and cosines ``(N, width)`` of times ``(N,)``, of periods from 2 pi to 2 pi 10^4."""
    half = max(width // 2, 1)
    scale = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) * scale)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
