"""Convolutions with strides in front of three linear layers: the victim of autoencoder attacks."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from leakatlas.models.parts import activation, require_positive, require_size, seeded


class StridedNet(nn.Module):
    """Convolutions C-12-32-64 (4x4, stride 2, padding 1), then linear layers L-L-512-classes.

    The victim that Scale-MIA's released code trains on CIFAR-10. L is 64 times an eighth of the
    image's side, squared: 1,024 at 32x32. There is no pooling and no normalisation, so a decoder
    can mirror the convolutions.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of 8.
        classes: Number of logits.
        act: Name of the activation.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        act: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive("StridedNet", in_channels=in_channels, classes=classes)
        require_size("StridedNet", size, at_least=8, multiple_of=8)
        with seeded(seed):
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise((in_channels, 12, 32, 64)):
                layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), activation(act)]
            self.features = nn.Sequential(*layers)
            latent = 64 * (size // 8) ** 2
            self.head = nn.Sequential(
                nn.Linear(latent, latent),
                activation(act),
                nn.Linear(latent, 512),
                activation(act),
                nn.Linear(512, classes),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits
