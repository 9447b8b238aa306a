"""The LeNet of the first gradient inversion attacks.

Zhu, Liu and Han, "Deep Leakage from Gradients" (NeurIPS 2019): three 5x5 convolutions of 12
channels with strides 2, 2, 1 and sigmoids (twice differentiable, as L-BFGS on gradients needs),
one fully connected layer, weights and biases uniform in [-0.5, 0.5].
"""

from __future__ import annotations

from torch import Tensor, nn

from leakatlas.models.parts import activation, require_positive, require_size, seeded


class LeNet(nn.Module):
    """Convolutions C-12-12-12 (5x5, padding 2, strides 2, 2, 1), then one linear layer.

    Args:
        in_channels: Channels of an image.
        size: Side of an image.
        classes: Number of logits.
        act: Name of the activation; sigmoid in the paper.
        width: Channels of each convolution.
        init_range: Weights and biases are uniform in ``[-init_range, init_range]``.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        act: str = "sigmoid",
        width: int = 12,
        init_range: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive("LeNet", in_channels=in_channels, classes=classes, width=width)
        require_size("LeNet", size)
        with seeded(seed):
            self.body = nn.Sequential(
                nn.Conv2d(in_channels, width, 5, padding=2, stride=2),
                activation(act),
                nn.Conv2d(width, width, 5, padding=2, stride=2),
                activation(act),
                nn.Conv2d(width, width, 5, padding=2, stride=1),
                activation(act),
            )
            side = -(-size // 4)
            self.fc = nn.Linear(width * side * side, classes)
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -init_range, init_range)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.body(x)
        logits: Tensor = self.fc(features.flatten(1))
        return logits
