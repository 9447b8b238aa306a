"""A small network that undoes what an inversion does to images, learned on pairs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.blocks.watch import Watch


class Denoiser(nn.Module):
    """What is added to an inverted image ``(N, C, H, W)``: five convolutions, nothing at first.

    Args:
        channels: C.
        width: Channels within.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for dilation in (1, 2, 1):
            layers += [
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.ReLU(),
            ]  # fmt: skip
        last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        assert last.bias is not None
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """The image, enhanced."""
        added: Tensor = self.body(x)
        return x + added

    @classmethod
    def of(cls, learned: Mapping[str, Tensor]) -> Denoiser:
        """The network that a lesson left."""
        first = learned["body.0.weight"]
        network = cls(first.shape[1], first.shape[0]).to(first)
        network.load_state_dict(dict(learned))
        return network.eval()


def fit(
    network: nn.Module,
    damaged: Tensor,
    originals: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    watch: Watch,
    batch: int = 16,
    lr: float = 1e-3,
    fall: float = 0.1,
) -> None:
    """Squared error from ``damaged`` to ``originals`` ``(M, C, H, W)`` by Adam, in place.

    The last quarter of the epochs runs at ``fall`` times ``lr``.
    """
    engine = torch.optim.Adam(network.parameters(), lr=lr)
    for step in watch.steps(epochs):
        for group in engine.param_groups:
            group["lr"] = lr * (1.0 if step.progress < 0.75 else fall)
        for places in torch.randperm(len(damaged), generator=generator).split(batch):
            loss = F.mse_loss(network(damaged[places]), originals[places])
            engine.zero_grad()
            loss.backward()
            engine.step()
