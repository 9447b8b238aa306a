"""Residual networks for small images.

He et al. (2016): the CIFAR form (three stages, depth 6n + 2, 16 channels, 3x3 stem) for ResNet-8,
-20 and -32, and the ImageNet form of ResNet-18 (four stages, 64 channels) with the 3x3 stem and
without the max-pool that 32x32 images ask for. Where the shape changes, the shortcut is a strided
1x1 convolution with the network's normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leakatlas.models.parts import activation, norm2d, require_positive, require_size, seeded

CIFAR8, CIFAR20, CIFAR32 = (1, 1, 1), (3, 3, 3), (5, 5, 5)
RESNET18 = (2, 2, 2, 2)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, *, stride: int, norm: str, act: str) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation would cancel it
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = norm2d(norm, out)
        self.act1 = activation(act)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=bias)
        self.norm2 = norm2d(norm, out)
        self.act2 = activation(act)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=bias), norm2d(norm, out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to ``(N, out, H / stride, W / stride)``."""
        h = self.act1(self.norm1(self.conv1(x)))
        y: Tensor = self.act2(self.norm2(self.conv2(h)) + self.shortcut(x))
        return y


class ResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks, global average pooling and one linear layer.

    Args:
        in_channels: Channels of an image.
        size: Side of an image.
        classes: Number of logits.
        blocks: Blocks of each stage; each stage after the first halves the side and doubles the
            channels.
        width: Channels of the first stage.
        norm: "none", "batch", "group" or "instance".
        act: Name of the activation.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        blocks: Sequence[int] = CIFAR20,
        width: int = 16,
        norm: str = "batch",
        act: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        blocks = tuple(blocks)
        require_positive(
            "ResNet", in_channels=in_channels, classes=classes, width=width, blocks=len(blocks)
        )
        for count in blocks:
            require_positive("ResNet", blocks=count)
        require_size("ResNet", size, at_least=2 ** (len(blocks) - 1))
        with seeded(seed):
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, width, 3, padding=1, bias=norm == "none"),
                norm2d(norm, width),
                activation(act),
            )
            layers: list[nn.Module] = []
            channels = width
            for stage, count in enumerate(blocks):
                out = width * 2**stage
                for index in range(count):
                    stride = 2 if stage > 0 and index == 0 else 1
                    layers.append(Block(channels, out, stride=stride, norm=norm, act=act))
                    channels = out
            self.blocks = nn.Sequential(*layers)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.pool(self.blocks(self.stem(x)))
        logits: Tensor = self.fc(features.flatten(1))
        return logits
