"""A round that the real Flower library carried, kept here so that every environment can read it.

``make test-flower`` makes it anew and compares; with ``LEAKATLAS_RECORD=1`` it is written.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

FLOWER = Path(__file__).parent / "flower"

SETTINGS: dict[str, int | float] = {
    "local-epochs": 2, "batch-size": 2, "learning-rate": 0.05, "num-server-rounds": 3,
    "dp-clipping-norm": 1.0, "dp-sensitivity": 0.01, "dp-epsilon": 5.0, "dp-delta": 1e-5,
}  # fmt: skip


def make() -> nn.Module:
    """A network with counters and single numbers among its buffers."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4 * 6 * 6, 3))


def batch() -> tuple[Tensor, Tensor]:
    """The client's four images and labels."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(4, 3, 8, 8, generator=generator), torch.arange(4) % 3


def train(model: nn.Module) -> None:
    """Two epochs in order."""
    x, y = batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for _ in range(2):
        for part in (slice(0, 2), slice(2, 4)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
