"""The label rules alone: no image is reconstructed, so no attack is run."""

from __future__ import annotations

from typing import Literal

from leakatlas import models
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import labels
from leakatlas.fl import replay

RULES: tuple[Literal["paper", "bias", "sum"], ...] = ("paper", "bias", "sum")


def measure(cell: Cell) -> dict[str, list[float]]:
    """Whether each rule finds the label of each image, on a network of its own."""
    images = scene.images(cell.case.victims, cell.data)
    hits: dict[str, list[float]] = {f"label_accuracy_{rule}": [] for rule in RULES}
    for index in range(len(images)):
        model = models.build(cell.case.model.builtin, seed=index, **cell.case.model.kwargs)
        head = labels.find_head(model)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        x, y = images.images[index : index + 1], images.labels[index : index + 1]
        g = replay.gradient(model, parameters, {}, x, y, create_graph=False)
        for rule in RULES:
            hits[f"label_accuracy_{rule}"].append(float(labels.idlg(g, head, rule=rule) == y))
    return hits
