"""A small convolutional image generator, usable stage by stage.

Attacks with a generative prior search its latent space, then its intermediate features or its
weights. However it is learned (:mod:`leakatlas.priors`), latents of a standard normal give
plausible images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.models.parts import norm2d, require_positive, require_size, seeded

EMBEDDED = 32
"""Numbers that stand for a label."""


class Generator(nn.Module):
    """Maps latents ``(N, latent)`` to images ``(N, channels, size, size)`` in [0, 1].

    With classes it is conditional: an embedding of the label goes in beside the latent.

    ``stages`` are the callables of which it is made: a linear map to ``widths[0]`` feature maps
    of side ``size / 2**(len(widths) - 1)``, one upsampling block for each further width, and the
    convolution to pixels with a sigmoid. GroupNorm throughout, so that train and eval mode agree
    and no image of a batch depends on another.

    Args:
        latent: Length of a latent vector.
        channels: Channels of an image.
        size: Side of an image.
        widths: Feature maps of each resolution, coarse to fine.
        classes: Labels that it is conditioned on; unconditional if 0.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        latent: int = 128,
        channels: int = 3,
        size: int = 32,
        widths: Sequence[int] = (96, 64, 48, 24),
        classes: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        if not widths:
            raise InvalidParameter("Generator(widths=()): expected at least one width.")
        require_positive("Generator", latent=latent, channels=channels)
        for width in widths:
            require_positive("Generator", widths=width)
        doublings = 2 ** (len(widths) - 1)
        require_size("Generator", size, at_least=doublings, multiple_of=doublings)
        if classes:
            require_positive("Generator", classes=classes)
        self.latent, self.channels, self.size, self.classes = latent, channels, size, classes
        self.widths = widths
        side = size // doublings
        told = EMBEDDED if classes else 0
        with seeded(seed):
            self.embedding = nn.Embedding(classes, told) if classes else None
            self.stages = nn.ModuleList(
                [
                    nn.Sequential(
                        nn.Linear(latent + told, widths[0] * side * side),
                        nn.Unflatten(1, (widths[0], side, side)),
                        norm2d("group", widths[0]),
                        nn.SiLU(),
                    ),
                    *(_upsample(coarse, fine) for coarse, fine in itertools.pairwise(widths)),
                    nn.Sequential(nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Sigmoid()),
                ]
            )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images ``(N, channels, size, size)`` in [0, 1] of latents ``(N, latent)``.

        Args:
            z: Latents.
            y: Labels ``(N,)`` of a conditional generator.

        Raises:
            InvalidInput: If a conditional generator gets no labels.
        """
        return self.resume(self.enter(z, y), 0)

    def enter(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """The input of stage 0: latents, and the embedding of labels beside them."""
        if self.embedding is None:
            return z
        if y is None:
            raise InvalidInput("A conditional Generator draws images of labels; it got none.")
        told: Tensor = self.embedding(y)
        return torch.cat([z, told.to(z)], dim=1)

    def resume(self, h: Tensor, stage: int) -> Tensor:
        """The image that follows from ``h``, the input of stage number ``stage``."""
        for module in self.stages[stage:]:
            h = module(h)
        return h


def _upsample(coarse: int, fine: int) -> nn.Sequential:
    # Nearest neighbours, then a convolution: no checkerboard, and smooth second derivatives.
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(coarse, fine, 3, padding=1),
        norm2d("group", fine),
        nn.SiLU(),
    )
