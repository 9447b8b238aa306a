"""A federation's way to its accuracy: the same training as without looks, and what looks show."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from leakatlas.bench import course, run, utility
from leakatlas.bench.adversary import Here
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import Case, Utility
from leakatlas.catalogue import code
from leakatlas.fl import Federation, RoundRecord

TOLD: dict[str, Any] = {
    "train": {"set": "digits", "count": 320}, "test": {"set": "digits", "first": 620, "count": 200},
    "split": 0.5, "sampled": 0.7, "rounds": 6, "rates": [0.5],
}  # fmt: skip
COURSE: dict[str, Any] = {"images": TOLD["test"], "goal": 0.3}


def cell(told: dict[str, Any], **changes: Any) -> Cell:
    plain = {
        "model": {"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "widths": [16]}},
        "victims": {"set": "digits", "count": 1},
        "protocol": {"algorithm": "fedsgd", "mode": "train"},
        "utility": told,
        "measures": [{"name": "accuracy"}],
    }
    return Cell("here", "main", Case.model_validate(plain | changes), seed=0, batch=0)


@pytest.mark.parametrize("defense", [[], [{"key": "precode"}], [{"key": "client_dp"}]])
def test_looks_do_not_move_the_training(defense: list[dict[str, Any]]) -> None:
    """PRECODE draws whenever its model predicts."""
    seen = course.measure(cell({**TOLD, "course": COURSE}, defenses=defense))
    plain = utility.measure(cell(TOLD, defenses=defense))
    assert {name: seen[name] for name in plain} == plain
    assert seen.keys() == set(course.MEASURES) and seen["diverged"] == 0


def test_a_look_is_the_accuracy_of_a_training_that_ends_there() -> None:
    seen = course.measure(cell({**TOLD, "rounds": 7, "course": {**COURSE, "every": 3}}))
    after = {n: utility.measure(cell({**TOLD, "rounds": n}))["accuracy"] for n in (2, 3, 4, 6, 7)}
    assert (seen["quarter"], seen["half"], seen["accuracy"]) == (after[2], after[4], after[7])
    for goal in (min(after.values()), after[6], max(after.values())):
        told = {**TOLD, "rounds": 7, "course": {**COURSE, "every": 3, "goal": goal}}
        first = next(number for number in (2, 3, 4, 6, 7) if after[number] >= goal)
        found = course.measure(cell(told))
        assert (found["rounds_to_goal"], found["reached"]) == (first, 1)
    missed = course.measure(cell({**TOLD, "course": {**COURSE, "goal": 1.0}}))
    assert (missed["rounds_to_goal"], missed["reached"]) == (7, 0)


def test_a_federation_that_blows_up_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    really = Federation.play_round

    def blown(self: Federation, **named: Any) -> RoundRecord:
        record = really(self, **named)
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] = float("inf")
        return record

    monkeypatch.setattr(Federation, "play_round", blown)
    assert course.measure(cell({**TOLD, "rounds": 1, "course": COURSE}))["diverged"] == 1


def test_a_cell_that_is_not_followed_keeps_its_name_and_its_code() -> None:
    plain, followed = cell(TOLD), cell({**TOLD, "course": COURSE})
    assert "course" not in json.dumps(plain.recipe) and plain.name != followed.name
    assert code.COURSE.endswith(".course") and plain.code_hash != followed.code_hash
    measures = [{"name": name} for name in course.MEASURES]
    record = run.run_cell(cell({**TOLD, "course": COURSE}, measures=measures), Here())
    assert record.status == "complete" and record.own.keys() == set(course.MEASURES), record.reason


def test_one_training_is_followed() -> None:
    several = {**TOLD, "rates": [0.5, 0.1], "validation": TOLD["test"], "course": COURSE}
    with pytest.raises(ValidationError, match="follows one training"):
        Utility.model_validate(several)
