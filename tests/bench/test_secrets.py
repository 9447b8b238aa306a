"""Fitting a defense's secret together with the image undoes what its mirror alone does not."""

from __future__ import annotations

import pytest
import torch

from leakatlas.bench import secrets
from leakatlas.blocks import matching
from leakatlas.data import Box, digits
from leakatlas.defenses.heuristic.learning.dcs2 import DCS2
from leakatlas.defenses.heuristic.model.fedkl import FedKL
from leakatlas.defenses.heuristic.model.precode import PRECODE
from leakatlas.defenses.heuristic.model.spn import SPN
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.fl import Defense, FedSGD, ModelRef, Scenario, View, stage
from leakatlas.threat import Grant

BOX = Box(mean=(0.5,), std=(0.5,))
KWARGS = {"in_channels": 1, "size": 8, "width": 8, "norm": "group", "act": "silu"}


def view_of(defense: Defense) -> View:
    scenario = Scenario(
        model=ModelRef("builtin", "convnet", KWARGS), defenses=(defense,), letter="C",
        protocol=FedSGD(mode="train"), grants=frozenset({Grant.LABELS}), examples=1,
    )  # fmt: skip
    live = stage(scenario, victims=digits().subset([3]), box=BOX)
    return live.view([live.federation.play_round()])


@pytest.mark.parametrize(
    "defense",
    [PRECODE(sigma_scale=0.5), FedKL(locked=0.5), SPN(code_length=8), DCS2(iterations=3)],
)
def test_more_steps_match_the_update_better(
    defense: Defense, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[float] = []
    plain = matching.relative_l2

    def heard(mine: dict[str, torch.Tensor], g: dict[str, torch.Tensor]) -> torch.Tensor:
        found = plain(mine, g)
        reached.append(float(found.detach()))
        return found

    monkeypatch.setattr(matching, "relative_l2", heard)
    view = view_of(defense)
    found = secrets.fitted(view, steps=40, seed=0)
    assert found is not None and found.shape == view.batch_shape
    assert bool(torch.isfinite(found).all())
    assert min(reached) < 0.7 * reached[0]


def test_a_defense_without_a_secret_has_nothing_to_fit() -> None:
    assert secrets.fitted(view_of(Clipping(max_norm=1.0)), steps=1, seed=0) is None
