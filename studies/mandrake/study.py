"""The arithmetic of the layers' sizes."""

from __future__ import annotations

from leakatlas.attacks.analytic.isolation import mandrake
from leakatlas.bench.cells import Cell

SHAPES = {
    "MNIST": (1, 28, 28),
    "CIFAR-100": (3, 32, 32),
    "Tiny ImageNet": (3, 64, 64),
    "ImageNet": (3, 256, 256),
}
"""Channels, height and width of the paper's data sets."""


def measure(cell: Cell) -> dict[str, float]:
    """What the layers of a case add to the model."""
    shape, clients = SHAPES[cell.label.split(", ")[1]], cell.case.clients
    dense = mandrake.dense_bytes(shape, bins=256, clients=clients) / mandrake.MIB
    sparse = mandrake.sparse_bytes(shape, bins=256, clients=clients) / mandrake.MIB
    return {"dense": dense, "sparse": sparse, "dense_over_sparse": dense / sparse}
