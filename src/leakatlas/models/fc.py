"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leakatlas.models.parts import activation, require_positive, require_rate, seeded


class FCNet(nn.Module):
    """Flatten, hidden linear layers with activations, a linear head.

    ``widths=(1000, 100), in_channels=1, size=28, classes=1, act="leaky_relu", bias=False`` is the
    FCN3 of R-GAP (Zhu and Blaschko, 2021) without the activation on its logit.

    Args:
        in_channels: Channels of an image.
        size: Side of an image.
        classes: Number of logits.
        widths: Units of each hidden layer; none for a linear classifier.
        bias: Whether the linear layers have biases.
        act: Name of the activation.
        dropout: Rate p after every hidden activation; no layer at all if 0.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        widths: Sequence[int] = (256, 128),
        bias: bool = True,
        act: str = "relu",
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_rate("FCNet", dropout)
        require_positive("FCNet", in_channels=in_channels, size=size, classes=classes)
        for width in widths:
            require_positive("FCNet", widths=width)
        with seeded(seed):
            layers: list[nn.Module] = [nn.Flatten()]
            units = in_channels * size * size
            for width in widths:
                layers += [nn.Linear(units, width, bias=bias), activation(act)]
                layers += [nn.Dropout(dropout)] if dropout else []
                units = width
            self.hidden = nn.Sequential(*layers)
            self.fc = nn.Linear(units, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        logits: Tensor = self.fc(self.hidden(x))
        return logits
