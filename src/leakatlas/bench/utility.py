"""What defenses cost: the accuracy of a federation that trains under them, without any attack."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from leakatlas import devices
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Images, Utility
from leakatlas.errors import InvalidInput
from leakatlas.fl import Client, Federation, poisson_cohort, state, stream, stream_seed
from leakatlas.fl.view import defense_from_json

EVALUATED = 2
"""Clients whose models are evaluated: private parts differ between them."""


def measure(cell: Cell) -> dict[str, float]:
    """Test ``accuracy`` at the step size that validates best, and that step size, ``lr``.

    Clients and server compute on the cell's device: nobody attacks here, so that no update has to
    be the same everywhere.

    Raises:
        InvalidInput: If the training images do not divide among the clients.
    """
    told = cell.case.utility
    assert told is not None
    if len(told.rates) == 1:
        return {"accuracy": _trained(cell, told, told.rates[0])[1], "lr": told.rates[0]}
    trained = [(*_trained(cell, told, lr), lr) for lr in told.rates]
    _, accuracy, lr = max(trained, key=lambda one: one[0])  # of equals the first
    return {"accuracy": accuracy, "lr": lr}


def _trained(cell: Cell, told: Utility, lr: float) -> tuple[float, float]:
    """Accuracy on validation and on test images, of the last round's models."""
    device = devices.chosen(torch.device(cell.device))
    x, y = _normalised(cell, told.train)
    dealt = shares(y, told, cell.seed)
    own = [Client(x[share].to(device), y[share].to(device)) for share in dealt]
    protocol = scene.protocol(cell.case, lr=lr)
    defenses = tuple(defense_from_json(defense) for defense in cell.case.defenses)
    model = state.on_device(scene.network(cell)[1], device)
    federation = Federation(model, dict(enumerate(own)), protocol, defenses, seed=cell.seed)
    drawn = stream(cell.seed, "cohorts")
    for _ in range(told.rounds):
        everyone = federation.clients
        cohort = poisson_cohort(everyone, told.sampled, drawn) if told.sampled else tuple(everyone)
        if cohort:  # of an empty one nothing is heard
            federation.play_round(cohort=cohort, apply=True)
    # A defended model may draw when it predicts.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(cell.seed)
        return (
            0.0
            if told.validation is None
            else _accuracy(cell, federation, told.validation, device),
            _accuracy(cell, federation, told.test, device),
        )


def shares(labels: Tensor, told: Utility, seed: int) -> tuple[Tensor, ...]:
    """Which training images each client holds: disjoint shares of equal size, all together.

    Under ``split`` a client draws its mix of classes from a symmetric Dirichlet distribution and
    then, image by image, a class from that mix among those that are left; who comes late takes
    what the others left, so that the last mixes are less one-sided than drawn. Where a mix lies on
    exhausted classes alone, an image is drawn from all that is left.

    Source:
        Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019, section 3, with the concentration that of every class.

    Args:
        labels: Of the training images, ``(N,)``.
        told: Number of clients, and the concentration.
        seed: Of the cell; no other draw rests on this stream.

    Returns:
        Indices of every client's images, ``(N / clients,)`` each.

    Raises:
        InvalidInput: If the training images do not divide among the clients.
    """
    if len(labels) % told.clients:
        raise InvalidInput(
            f"{len(labels)} training images do not divide among {told.clients} clients."
        )
    if told.split is None:
        return torch.arange(len(labels)).chunk(told.clients)
    rng = np.random.default_rng(stream_seed(seed, "split"))
    pools = [rng.permutation(np.flatnonzero(labels == c)).tolist() for c in labels.unique()]
    dealt: list[list[int]] = []
    for mix in rng.dirichlet([told.split] * len(pools), size=told.clients):
        dealt.append([])
        for _ in range(len(labels) // told.clients):
            left = np.array([len(pool) for pool in pools])
            odds = mix * (left > 0)
            odds = odds if odds.sum() > 0 else left
            dealt[-1].append(pools[rng.choice(len(pools), p=odds / odds.sum())].pop())
    return tuple(torch.tensor(dealt))


@torch.no_grad()
def _accuracy(cell: Cell, federation: Federation, images: Images, device: torch.device) -> float:
    x, y = (tensor.to(device) for tensor in _normalised(cell, images))
    right = [
        (federation.evaluation_model(client)(x).argmax(1) == y).double().mean()
        for client in range(min(EVALUATED, len(federation.clients)))
    ]
    return float(torch.stack(right).mean())


def _normalised(cell: Cell, images: Images) -> tuple[Tensor, Tensor]:
    found = scene.images(images, cell.data)
    return scene.pixel_space(cell.case, found.channels).normalize(found.images), found.labels
