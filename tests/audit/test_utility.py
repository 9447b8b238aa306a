"""The price of a defense: on the reference task, and on the audit's own model and images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leakatlas.audit import utility
from leakatlas.audit.config import AuditConfig, make_plan
from leakatlas.audit.utility import Task, Utility, accuracy_under, price_of
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedSGD


def own(tmp_path: Path, told: Any = "own", **data: Any) -> Task:
    config = AuditConfig.model_validate(
        {
            "model": {
                "builtin": "fc",
                "kwargs": {"in_channels": 1, "size": 8, "classes": 10, "widths": [16], "seed": 0},
            },
            "data": {"victims": "digits", "limit": 2, "mean": [0.5], "std": [0.5], **data},
            "protocol": {"algorithm": "fedsgd", "mode": "train"},
            "utility": told,
        }
    )
    task = make_plan(config, base=tmp_path, command="").task
    assert task is not None
    return task


SMALL = {"limit": 300, "clients": 3, "rounds": 12, "rates": [0.5, 1e-4]}


def test_the_reference_task_is_the_default(tmp_path: Path) -> None:
    config = AuditConfig.model_validate({"model": {"builtin": "convnet"}})
    assert make_plan(config, base=tmp_path, command="").task is None


def test_ones_own_task_holds_the_audits_model_protocol_and_other_images(tmp_path: Path) -> None:
    task = own(tmp_path)
    assert isinstance(task.protocol, FedSGD) and task.box.mean == (0.5,)
    assert task.validation is not None
    parts = [task.train, task.validation, task.test]
    assert sum(map(len, parts)) == 1_795  # 1,797 digits, of which two are under attack
    seen = {image.numpy().tobytes() for part in parts for image in part.images}
    victims = make_plan_victims(tmp_path)
    assert not seen & {image.numpy().tobytes() for image in victims}


def make_plan_victims(tmp_path: Path) -> torch.Tensor:
    config = AuditConfig.model_validate(
        {"model": {"builtin": "convnet", "kwargs": {"in_channels": 1, "size": 8}},
         "data": {"victims": "digits", "limit": 2}}
    )  # fmt: skip
    return make_plan(config, base=tmp_path, command="").settings[0].victims.images


def test_the_step_size_is_chosen_for_the_defense(tmp_path: Path) -> None:
    """Of two, one of which moves nothing; the test images decide nothing."""
    task = own(tmp_path, SMALL)
    both = accuracy_under((), task)
    still = accuracy_under((), replace(task, rates=(1e-4,)))
    moved = accuracy_under((), replace(task, rates=(0.5,)))
    assert both == moved and moved.accuracy is not None and still.accuracy is not None
    assert moved.accuracy > still.accuracy + 0.2


def test_noise_costs_accuracy_on_it(tmp_path: Path) -> None:
    task = own(tmp_path, SMALL)
    noisy = accuracy_under((registry.defense("client_dp", noise_multiplier=6.0),), task)
    plain = accuracy_under((), task)
    assert plain.accuracy is not None and noisy.accuracy is not None
    assert noisy.accuracy < plain.accuracy - 0.2


def test_a_price_is_kept_by_all_that_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility, "cache_folder", lambda: tmp_path)
    asked: list[Task] = []

    def counted(defenses: object, task: Task, **_: object) -> Utility:
        asked.append(task)
        return Utility(0.5)

    monkeypatch.setattr(utility, "accuracy_under", counted)
    task = own(tmp_path, SMALL)
    for other in (task, task, replace(task, rounds=3), replace(task, rates=(0.1,))):
        assert price_of((), task=other) == Utility(0.5)
    assert len(asked) == 3


def test_a_spent_budget_gives_no_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utility, "cache_folder", lambda: tmp_path / "prices of this test")
    found = price_of((), task=own(tmp_path, SMALL), watch=Watch(0.0))
    assert found.accuracy is None and "budget" in found.reason


def test_too_few_images_are_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be dealt to 40"):
        own(tmp_path, {"limit": 20, "clients": 40})
    with pytest.raises(InvalidInput, match="Name train and test"):
        own(tmp_path, limit=1_797)


def test_the_test_images_choose_no_step_size(tmp_path: Path) -> None:
    """Where those held back tell nothing apart, the first step size stands, the worse one too."""
    task = replace(own(tmp_path, SMALL), validation=None, rates=(1e-4, 0.5))
    first = accuracy_under([], replace(task, rates=(1e-4,)))
    second = accuracy_under([], replace(task, rates=(0.5,)))
    assert first.accuracy is not None and second.accuracy is not None
    assert first.accuracy < second.accuracy
    assert accuracy_under([], task) == first
