"""The networks of R-GAP: CNN6, whose layers all keep enough information, and CNN6-d, which fails.

Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy" (ICLR 2021). Convolutions
3-12 (4x4, stride 2, padding 2), 12-36 (3x3, stride 2), 36-36 twice (stride 1), 36-64 (stride 2),
64-128 (stride 1), all but the first with padding 1, LeakyReLU 0.2, no biases; at 32x32 the linear
head then sees 128 x 5 x 5 = 3,200 features. CNN6-d has 20 instead of 36 channels after the second
convolution, which makes the recursion rank deficient.
"""

from __future__ import annotations

from torch import Tensor, nn

from leakatlas.models.parts import activation, require_positive, require_size, seeded


class CNN6(nn.Module):
    """Six convolutions and one linear layer, invertible activations, no convolution biases.

    Args:
        in_channels: Channels of an image.
        size: Side of an image.
        classes: Number of logits; 1 (a binary logit) is the paper's, 10 the biased softmax form.
        head_bias: Whether the linear layer has a bias.
        second: Channels of the second convolution: 36 for CNN6, 20 for CNN6-d.
        act: Name of the activation; it must be invertible for the attack ("leaky_relu" has
            slope 0.2, "identity" makes the network linear).
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 1,
        head_bias: bool = False,
        second: int = 36,
        act: str = "leaky_relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive("CNN6", in_channels=in_channels, classes=classes, second=second)
        require_size("CNN6", size)
        # (out, kernel, stride, padding) of each convolution
        plan = (
            (12, 4, 2, 2),
            (second, 3, 2, 1),
            (36, 3, 1, 1),
            (36, 3, 1, 1),
            (64, 3, 2, 1),
            (128, 3, 1, 1),
        )
        with seeded(seed):
            layers: list[nn.Module] = []
            channels, side = in_channels, size
            for out, kernel, stride, padding in plan:
                layers.append(
                    nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
                )
                layers.append(activation(act))
                channels, side = out, (side + 2 * padding - kernel) // stride + 1
            self.body = nn.Sequential(*layers)
            self.fc = nn.Linear(channels * side * side, classes, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.body(x)
        logits: Tensor = self.fc(features.flatten(1))
        return logits
