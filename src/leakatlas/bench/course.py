"""How a federation gets there: its accuracy on the way, under the defenses of the case.

It trains as :mod:`leakatlas.bench.utility` does, bit for bit, and looks at the models between
rounds. The loop stands here once more because published records are bound to the text of that
module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from leakatlas import devices
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Images, Utility
from leakatlas.bench.utility import EVALUATED, shares
from leakatlas.fl import Client, Federation, poisson_cohort, state, stream
from leakatlas.fl.view import defense_from_json

MEASURES = ("accuracy", "lr", "quarter", "half", "rounds_to_goal", "reached", "diverged")
"""What :func:`measure` gives."""


def measure(cell: Cell) -> dict[str, float]:
    """The training's ``accuracy`` on test images, and how it got there on those of the course.

    Returns:
        ``accuracy`` and ``lr`` as :func:`leakatlas.bench.utility.measure` does; ``quarter`` and
        ``half``, accuracies after so much of the rounds (rounded up); ``rounds_to_goal``, the first
        look at which the goal was reached, or one round more than there are; ``reached`` and
        ``diverged``, yes (1) or no: whether it was, and whether some entry of a model is not
        finite at the end.

    Raises:
        InvalidInput: If the training images do not divide among the clients.
    """
    told = cell.case.utility
    assert told is not None and told.course is not None
    course, rounds = told.course, told.rounds
    quarter, half = math.ceil(rounds / 4), math.ceil(rounds / 2)
    looks: dict[int, float] = {}
    for number, federation in enumerate(_played(cell, told), 1):
        if number % course.every == 0 or number in (quarter, half, rounds):
            looks[number] = _accuracy(cell, federation, course.images)
    reached = [number for number, accuracy in looks.items() if accuracy >= course.goal]
    return {
        "accuracy": _accuracy(cell, federation, told.test),
        "lr": told.rates[0],
        "quarter": looks[quarter],
        "half": looks[half],
        "rounds_to_goal": float(min(reached, default=rounds + 1)),
        "reached": float(bool(reached)),
        "diverged": float(not all(map(_finite, _models(federation)))),
    }


def _played(cell: Cell, told: Utility) -> Iterator[Federation]:
    """The federation after every round."""
    device = devices.chosen(torch.device(cell.device))
    found = scene.images(told.train, cell.data)
    x = scene.pixel_space(cell.case, found.channels).normalize(found.images)
    own = [
        Client(x[share].to(device), found.labels[share].to(device))
        for share in shares(found.labels, told, cell.seed)
    ]
    protocol = scene.protocol(cell.case, lr=told.rates[0])
    defenses = tuple(defense_from_json(defense) for defense in cell.case.defenses)
    model = state.on_device(scene.network(cell)[1], device)
    federation = Federation(model, dict(enumerate(own)), protocol, defenses, seed=cell.seed)
    drawn = stream(cell.seed, "cohorts")
    for _ in range(told.rounds):
        everyone = federation.clients
        cohort = poisson_cohort(everyone, told.sampled, drawn) if told.sampled else tuple(everyone)
        if cohort:  # of an empty one nothing is heard
            federation.play_round(cohort=cohort, apply=True)
        yield federation


def _models(federation: Federation) -> list[nn.Module]:
    """As first clients use them: private parts differ between them."""
    return [federation.evaluation_model(c) for c in range(min(EVALUATED, len(federation.clients)))]


@torch.no_grad()
def _accuracy(cell: Cell, federation: Federation, images: Images) -> float:
    device = devices.chosen(torch.device(cell.device))
    found = scene.images(images, cell.data)
    x = scene.pixel_space(cell.case, found.channels).normalize(found.images).to(device)
    y = found.labels.to(device)
    # A defended model may draw when it predicts; no look may move the training.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(cell.seed)
        right = [(model(x).argmax(1) == y).double().mean() for model in _models(federation)]
    return float(torch.stack(right).mean())


def _finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
