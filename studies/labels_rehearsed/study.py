"""Labels of a batch: the rule for fresh networks beside the one that rehearsed best."""

from __future__ import annotations

import torch
from torch import Tensor

from leakatlas.audit.games import CROPS
from leakatlas.audit.labels import CERTIFIED, Reader, candidates
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
    photos = strangers(scene.victims(cell), CROPS)
    guesses = [rule for rule in candidates() if rule != CERTIFIED]
    best = Reader(views[0], photos, seed=cell.seed)
    guessing = Reader(views[0], photos, seed=cell.seed, rules=guesses)
    even = labels.round_counts(torch.zeros(made.classes), batch)
    found: dict[str, list[float]] = {}

    def note(**figures: float) -> None:
        for name, figure in figures.items():
            found.setdefault(name, []).append(float(figure))

    for client, view in zip(clients, views, strict=True):
        wanted = counts(made.truth(client).labels, made.classes)

        def shared(answer: Tensor, wanted: Tensor = wanted) -> int:
            return int(torch.minimum(answer, wanted).sum())

        fixed = shared(counts(observed.known_labels(view), made.classes))
        read, guess = best(view), guessing(view)
        rehearsed = shared(counts(torch.tensor(read.labels, dtype=torch.int64), made.classes))
        guessed = shared(counts(torch.tensor(guess.labels, dtype=torch.int64), made.classes))
        note(
            fixed_right=fixed == batch,
            fixed_overlap=fixed / batch,
            rehearsed_right=rehearsed == batch,
            rehearsed_overlap=rehearsed / batch,
            even_spread_overlap=shared(even) / batch,
            believed_right=read.right / max(read.batches, 1),
            believed_at_least=read.trust,
            guessed_right=guessed == batch,
            guessed_believed=guess.right / max(guess.batches, 1),
            guessed_at_least=guess.trust,
            certified=read.rule == CERTIFIED,
        )
    return found


def counts(y: Tensor, classes: int) -> Tensor:
    """How often each class occurs, ``(K,)``."""
    return torch.bincount(y, minlength=classes)
