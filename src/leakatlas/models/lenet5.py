"""LeNet-5 in its usual form: sigmoids, average pools and three linear layers.

LeCun, Bottou, Bengio and Haffner (1998), with full instead of partial connections and a linear
head; the convolutional network of MKOR (Wang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leakatlas.models.parts import activation, require_positive, require_size, seeded


class LeNet5(nn.Module):
    """Convolutions 6-pool-16-pool (5x5), then linear layers 120-84-classes.

    PyTorch's own initialisation.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of 4.
        classes: Number of logits.
        widths: Channels of the two convolutions.
        hidden: Units of the linear layers before the head.
        padding: Of the second convolution, which is 0 in the original; the first has 2.
        act: Name of the activation.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        widths: tuple[int, int] = (6, 16),
        hidden: Sequence[int] = (120, 84),
        padding: int = 0,
        act: str = "sigmoid",
        seed: int = 0,
    ) -> None:
        super().__init__()
        first, second = widths
        require_positive(
            "LeNet5", in_channels=in_channels, classes=classes, widths=first, padding=padding + 1
        )
        require_positive("LeNet5", widths=second)
        for units in hidden:
            require_positive("LeNet5", hidden=units)
        require_size("LeNet5", size, at_least=12, multiple_of=4)
        with seeded(seed):
            self.features = nn.Sequential(
                nn.Conv2d(in_channels, first, 5, padding=2),
                activation(act),
                nn.AvgPool2d(2),
                nn.Conv2d(first, second, 5, padding=padding),
                activation(act),
                nn.AvgPool2d(2),
            )
            side = (size // 2 + 2 * padding - 4) // 2
            units = second * side * side
            layers: list[nn.Module] = []
            for width in hidden:
                layers += [nn.Linear(units, width), activation(act)]
                units = width
            self.hidden = nn.Sequential(*layers) if layers else None
            self.fc = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.features(x)
        flat = features.flatten(1)
        logits: Tensor = self.fc(flat if self.hidden is None else self.hidden(flat))
        return logits
