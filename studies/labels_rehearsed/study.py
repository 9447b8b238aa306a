"""Labels of batches of four: the rule for fresh networks beside the one that rehearsed best."""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.audit.games import CROPS
from leakatlas.audit.labels import Reader, candidates
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import labels, observed
from leakatlas.data import strangers


def measure(cell: Cell) -> dict[str, list[float]]:
    """Whether each batch was read right, and how much of it, by either rule."""
    made = scene.staged(cell)
    batch, clients = cell.case.batch, range(cell.case.clients)
    record = made.federation.play_round()
    views = [made.view([record], target=client) for client in clients]
    reader = Reader(views[0], strangers(scene.victims(cell), CROPS), seed=cell.seed)
    found: dict[str, list[float]] = {
        "believed_right": [reader.right],
        "believed_overlap": [reader.overlap],
        "rule": [float(candidates().index(reader.rule))],
    }
    for client, view in zip(clients, views, strict=True):
        wanted = counts(made.truth(client).labels, made.classes)
        answers = {
            "fixed": counts(observed.known_labels(view), made.classes),
            "rehearsed": counts(torch.tensor(reader(view), dtype=torch.int64), made.classes),
            "even_spread": labels.round_counts(torch.zeros(made.classes), batch),
        }
        for name, answer in answers.items():
            shared = int(torch.minimum(answer, wanted).sum())
            found.setdefault(f"{name}_right", []).append(float(shared == batch))
            found.setdefault(f"{name}_overlap", []).append(shared / batch)
    del found["even_spread_right"]
    return found


def counts(y: Tensor, classes: int) -> Tensor:
    """How often each class occurs, ``(K,)``."""
    return torch.bincount(y, minlength=classes)
