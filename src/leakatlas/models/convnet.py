"""The small ConvNet on which most of the figures are measured."""

from __future__ import annotations

from torch import Tensor, nn

from leakatlas.models.parts import activation, norm2d, require_positive, require_size, seeded


class ConvNet(nn.Module):
    """Convolutions C-32-64-pool-64-128-pool (3x3, padding 1), then one linear layer.

    PyTorch's own initialisation. With a normalisation, the convolutions keep their biases, so
    that the parameter list differs from the plain network by the normalisation layers alone.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of 4.
        classes: Number of logits.
        width: Channels of the first convolution; the others are 2, 2 and 4 times that.
        norm: "none", "batch", "group" or "instance", after every convolution.
        act: Name of the activation.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        width: int = 32,
        norm: str = "none",
        act: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive("ConvNet", in_channels=in_channels, classes=classes, width=width)
        require_size("ConvNet", size, at_least=4, multiple_of=4)
        with seeded(seed):
            layers: list[nn.Module] = []
            channels = in_channels
            for out, pool in (
                (width, False),
                (2 * width, True),
                (2 * width, False),
                (4 * width, True),
            ):
                layers.append(nn.Conv2d(channels, out, 3, padding=1))
                if norm != "none":
                    layers.append(norm2d(norm, out))
                layers.append(activation(act))
                if pool:
                    layers.append(nn.MaxPool2d(2))
                channels = out
            self.features = nn.Sequential(*layers)
            self.fc = nn.Linear(channels * (size // 4) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.features(x)
        logits: Tensor = self.fc(features.flatten(1))
        return logits
