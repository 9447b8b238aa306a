"""Four convolutions with strides instead of pools: cheap enough to train whole federations with."""

from __future__ import annotations

from torch import Tensor, nn

from leakatlas.models.parts import activation, norm2d, require_positive, require_size, seeded


class AllConv(nn.Module):
    """Convolutions C-24-48-72-96 (3x3, stride 2, padding 1), then one linear layer.

    That strides can take the place of pools is Springenberg et al.'s observation ("Striving for
    Simplicity: The All Convolutional Net", 2015); widths and depth are ours. No convolution has
    outputs at the image's full side, so that a step costs a fraction of one of
    :class:`~leakatlas.models.convnet.ConvNet` with as many entries.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of 16.
        classes: Number of logits.
        width: Channels of the first convolution; the others are 2, 3 and 4 times that.
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
        width: int = 24,
        norm: str = "none",
        act: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_positive("AllConv", in_channels=in_channels, classes=classes, width=width)
        require_size("AllConv", size, at_least=16, multiple_of=16)
        with seeded(seed):
            layers: list[nn.Module] = []
            channels = in_channels
            for times in (1, 2, 3, 4):
                out = times * width
                layers.append(nn.Conv2d(channels, out, 3, stride=2, padding=1))
                if norm != "none":
                    layers.append(norm2d(norm, out))
                layers.append(activation(act))
                channels = out
            self.features = nn.Sequential(*layers)
            self.fc = nn.Linear(channels * (size // 16) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.features(x)
        logits: Tensor = self.fc(features.flatten(1))
        return logits
