"""Several attacks on every client of one round."""

from __future__ import annotations

import pytest
import torch

from leakatlas.attacks.api import Reconstruction
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsed import Contest
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Case
from leakatlas.fl import View
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr


@pytest.fixture(scope="module")
def contest() -> Contest:
    case = Case.model_validate(
        {
            "model": {"builtin": "fc", "kwargs": {"size": 8, "widths": [16]}},
            "victims": "patches:8:4",
            "surrogate": "patches:8:12:surrogate",
            "clients": 2, "batch": 2, "letter": "D", "grants": ["labels"], "measures": ["psnr"],
        }
    )  # fmt: skip
    return Contest(Cell("here", "main", case, seed=0, batch=0))


def test_every_client_is_attacked_and_all_its_images_are_scored(contest: Contest) -> None:
    attack = InvertingGradients(steps=3)
    runs = contest.runs(attack)
    assert len(runs.found) == len(runs.cpu_seconds) == 2 and len(runs.psnr) == 4
    first = contest.runs(attack, count=1)
    assert first.psnr == runs.psnr[:2]  # repeated bit for bit
    assert torch.equal(first.found[0].images, runs.found[0].images)


def test_without_a_fact_the_view_does_not_hold_it(contest: Contest) -> None:
    attack = InvertingGradients(steps=3)
    held, blind = contest.runs(attack), contest.runs(attack, without="labels")
    assert "labels" in held.found[0].reads and "labels" not in blind.found[0].reads


def test_a_constant_image_is_scored_against_every_victim(contest: Contest) -> None:
    truths = torch.cat([contest.stage.victims[client].images for client in (0, 1)])
    grey = torch.full_like(truths[0], 0.5)
    assert contest.constant(grey) == psnr(grey.expand_as(truths), truths).tolist()


def test_an_image_without_a_candidate_counts_as_the_mean_public_image(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(attack: InvertingGradients, view: View, **_: object) -> Reconstruction:
        del attack
        return Reconstruction(images=torch.zeros(0, *view.input_shape))

    monkeypatch.setattr(InvertingGradients, "__call__", nothing)
    public = scene.public_images(contest.stage)[0]
    assert contest.runs(InvertingGradients()).psnr == contest.constant(mean_image(public))


def test_the_variant_that_rebuilds_own_images_is_taken(contest: Contest) -> None:
    # Steps that move nothing cannot win against steps that descend.
    variants = {"still": InvertingGradients(lr=1e-9), "moving": InvertingGradients(lr=0.1)}
    surrogate = contest.views[0].surrogate
    best = contest.rehearsed(variants, surrogate, iterations=40)
    assert (best.name, best.number) == ("moving", 1) and best.cpu_seconds > 0
    assert best.attack.to_json()["steps"] == 40
