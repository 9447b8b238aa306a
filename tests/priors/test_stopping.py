"""When a gan has learned enough: which looks are made, which weights are kept, when it ends."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import data
from leakatlas.blocks.watch import Step, Watch
from leakatlas.data import ImageSet
from leakatlas.models.parts import seeded
from leakatlas.priors import Prior, learning, training
from leakatlas.priors.stopping import Stopping


def _digits(count: int = 80) -> ImageSet:
    return data.digits(8).subset(range(count))


class Scripted:
    """A figure that says what it was told to say, and what weights it was shown."""

    def __init__(self, *values: float) -> None:
        self.left, self.shown = list(values), list[Tensor]()

    def __call__(self, network: nn.Module) -> float:
        self.shown.append(nn.utils.parameters_to_vector(network.parameters()).clone())
        return self.left.pop(0)


def _taught(steps: int, stops: Stopping | None, **more: Any) -> int:
    images = _digits().images
    with seeded(0):
        taught = learning.lesson("gan", (1, 8, 8), latent=8, batch=8)
        return learning.teach(
            taught, images, torch.zeros(len(images), dtype=torch.int64), steps=steps,
            generator=torch.Generator().manual_seed(0), **{"watch": Watch(), **more},
            flips=False, stopping=stops,
        )  # fmt: skip


def test_looks_are_a_twentieth_of_the_training_apart_and_never_closer_than_that() -> None:
    def looks(steps: int) -> list[int]:
        stops = Stopping(lambda network: 0.0, patience=9, apart=3)
        for step in range(steps):
            if stops.due(step + 1, step / steps):
                stops.look(step + 1, nn.Linear(1, 1))
        return [step for step, _ in stops.curve]

    assert looks(100) == [6 + 5 * k for k in range(19)]
    assert looks(20) == [3, 6, 9, 12, 15, 18]


def test_training_ends_when_no_look_is_better_and_keeps_the_best_weights() -> None:
    figure = Scripted(1.0, 3.0, 2.0, 3.0, 2.9, 4.0)
    stops = Stopping(figure, patience=3, apart=1)
    assert _taught(40, stops) == 11  # looks after 3, 5, 7, 9, 11: three without a better one
    assert stops.over and stops.best == (5, 3.0)  # an equal one is no better
    assert [step for step, _ in stops.curve] == [3, 5, 7, 9, 11]
    kept = torch.cat([stops.weights[n].flatten() for n in stops.weights])
    assert torch.equal(kept, figure.shown[1]) and not torch.equal(kept, figure.shown[4])


def test_a_figure_that_rises_lets_training_run_to_its_end_and_the_last_weights_count() -> None:
    stops = Stopping(Scripted(*range(20)), patience=2, apart=4)
    assert _taught(10, stops) == 10
    assert not stops.over and stops.best[0] == 10 and len(stops.curve) == 3


def test_a_generator_that_broke_down_is_not_kept() -> None:
    stops = Stopping(Scripted(math.nan, 1.0, math.nan), patience=9)
    for step in (1, 2, 3):
        stops.look(step, nn.Linear(1, 1))
    assert stops.best == (2, 1.0)
    figures = training.told(stops)
    assert figures == {
        training.STOPPED: 0, "weights_of_step": 2, "inversion_psnr_db_at_step_2": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("sign", "at", "ends"), [(1, 2, 5), (-1, 5, 9)])
def test_a_stopped_training_looks_and_ends_as_if_it_had_not_been(
    sign: int, at: int, ends: int, tmp_path: Path
) -> None:
    """By a figure of the weights that falls from the first look on, and by one that rises."""

    def score(network: nn.Module) -> float:
        weights = nn.utils.parameters_to_vector(network.parameters()).detach()
        return sign * float(weights.sin().sum())

    class Stops(Watch):
        def steps(self, total: int, **more: Any) -> Iterator[Step]:
            for step in super().steps(total, **more):
                yield step
                if step.index == at:
                    return

    whole, first, second = (Stopping(score, patience=3, apart=1) for _ in range(3))
    assert _taught(9, whole) == ends and whole.over == (ends == 5)
    file = tmp_path / "training"
    assert _taught(9, first, watch=Stops(), checkpoint=file) == at + 1
    assert _taught(9, second, checkpoint=file) == ends
    assert second.curve == whole.curve and second.over == whole.over
    assert all(torch.equal(whole.weights[n], t) for n, t in second.weights.items())
    again = Stopping(score, patience=3, apart=1)  # after the end nothing more is learned
    assert _taught(9, again, checkpoint=file) == ends and again.curve == whole.curve


def test_a_training_that_had_ended_by_itself_does_not_go_on(tmp_path: Path) -> None:
    file = tmp_path / "training"
    ended = Stopping(Scripted(2.0, 1.0), patience=1, apart=1)
    assert _taught(40, ended, checkpoint=file) == 5 and ended.over
    again = Stopping(Scripted(), patience=1, apart=1)
    assert _taught(40, again, checkpoint=file) == 5
    assert again.curve == ended.curve


def _trained(**recipe: Any) -> Prior:
    made = training.train(
        _digits(), training.Recipe(kind="gan", latent=8, batch=8, **recipe), name="tiny",
        license="MIT", command="c", watch=Watch(),
    )  # fmt: skip
    assert isinstance(made, Prior)
    return made


def test_the_card_says_where_it_stopped_and_what_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[Tensor] = []

    def look(network: nn.Module, images: Tensor, labels: Tensor) -> float:
        del network, labels
        shown.append(images)
        return -abs(len(shown) - 2.0)

    monkeypatch.setattr(training, "_look", look)
    monkeypatch.setattr(training, "Stopping", functools.partial(Stopping, apart=1))
    card = _trained(steps=60, patience=2).card
    assert card.split == ("the first 68 of 80 images; the next 4 to stop by, the last 8 held out")
    assert all(torch.equal(images, _digits().images[68:72]) for images in shown)
    assert card.figures[training.STOPPED] == 1 and card.figures["weights_of_step"] == 7
    looks = {n: v for n, v in card.figures.items() if n.startswith(training.LOOK)}
    assert looks == {
        f"{training.LOOK}{step}": v for step, v in ((4, -1), (7, 0), (10, -1), (13, -2))
    }
    assert card.figures["steps"] == 13 and card.recipe == "c --steps 60"


def test_without_patience_the_length_is_the_one_asked_for() -> None:
    card = _trained(steps=3, patience=0).card
    assert card.split == "the first 72 of 80 images; the last 8 held out"
    assert card.figures["steps"] == 3 and card.figures[training.STOPPED] == 0
    assert not any(name.startswith(training.LOOK) for name in card.figures)


def test_a_look_leaves_the_network_and_the_numbers_drawn_as_they_are() -> None:
    with seeded(0):
        taught = learning.lesson("gan", (1, 8, 8), latent=8)
    network = taught.result()
    before, state = [p.clone() for p in network.parameters()], torch.get_rng_state()
    images, labels = _digits(4).images, _digits(4).labels
    found = training._look(network, images, labels)
    assert found == training._look(network, images, labels) and 0 < found < 60
    assert torch.equal(state, torch.get_rng_state())
    pairs = zip(before, network.parameters(), strict=True)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in pairs)
