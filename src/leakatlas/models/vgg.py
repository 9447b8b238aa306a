"""VGG networks for small images.

Simonyan and Zisserman (2015), in the form usual for 32x32: 3x3 convolutions, a 2x2 max-pool after
each group, one linear layer instead of three unless ``hidden`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from leakatlas.models.parts import activation, norm2d, require_positive, require_size, seeded

# Convolutions per group, each group at twice the width of the one before up to 8 times the first.
DEPTHS: dict[int, tuple[int, ...]] = {
    6: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
}


class VGG(nn.Module):
    """Groups of 3x3 convolutions, each ended by a max-pool, then a linear head.

    Args:
        in_channels: Channels of an image.
        size: Side of an image; a multiple of ``2 ** len(groups)``.
        classes: Number of logits.
        groups: Convolutions of each group; see :data:`DEPTHS`.
        width: Channels of the first group (64 in the paper); doubled per group up to 8 times.
        norm: "none", "batch", "group" or "instance", after every convolution.
        act: Name of the activation.
        hidden: Units of linear layers before the head; ``(4096, 4096)`` in the paper.
        seed: Seed of the weights.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        size: int = 32,
        classes: int = 10,
        groups: Sequence[int] = DEPTHS[11],
        width: int = 64,
        norm: str = "none",
        act: str = "relu",
        hidden: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        for units in hidden:
            require_positive("VGG", hidden=units)
        groups = tuple(groups)
        require_positive(
            "VGG", in_channels=in_channels, classes=classes, width=width, groups=len(groups)
        )
        for count in groups:
            require_positive("VGG", groups=count)
        shrink = 2 ** len(groups)
        require_size("VGG", size, at_least=shrink, multiple_of=shrink)
        with seeded(seed):
            layers: list[nn.Module] = []
            channels = in_channels
            for index, count in enumerate(groups):
                out = width * min(2**index, 8)
                for _ in range(count):
                    layers.append(nn.Conv2d(channels, out, 3, padding=1))
                    if norm != "none":
                        layers.append(norm2d(norm, out))
                    layers.append(activation(act))
                    channels = out
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    # He et al. (2015): without normalisation the default init fades with depth.
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            units = channels * (size // shrink) ** 2
            dense: list[nn.Module] = []
            for wide in hidden:
                dense += [nn.Linear(units, wide), activation(act)]
                units = wide
            self.hidden = nn.Sequential(*dense) if dense else None
            self.fc = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, classes)`` of images ``(N, C, H, W)``."""
        features: Tensor = self.features(x)
        flat = features.flatten(1)
        logits: Tensor = self.fc(flat if self.hidden is None else self.hidden(flat))
        return logits
