"""Where a framework's local differential privacy gives no guarantee, and what it gives instead."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from leakatlas.audit import AuditConfig, examine, make_plan
from leakatlas.audit.promises import Promise, promise_of
from leakatlas.defenses.formal.dp._accounting import gaussian_delta
from leakatlas.errors import InvalidParameter
from leakatlas.fl.recording import Exchange, Recorder
from leakatlas.fl.state import model_state
from leakatlas.models import build

SOUND = {"epsilon": 0.5, "delta": 1e-5, "sensitivity": 2.0, "clipping_norm": 1.0}


def test_a_promise_whose_conditions_hold_is_kept() -> None:
    promise = Promise.from_json(SOUND)
    assert promise.doubts() == ()
    assert promise.sigma == pytest.approx(2.0 * math.sqrt(2 * math.log(1.25e5)) / 0.5)
    # The classical formula is an upper bound: the exact curve gives no more than was promised.
    assert promise.worth() < promise.epsilon
    assert gaussian_delta(promise.worth(), 2.0 / promise.sigma) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "rounds", "words"),
    [
        ({"epsilon": 1.0}, 1, "proven below 1 only"),
        ({"sensitivity": 1.9}, 1, "may be 2 apart"),
        ({}, 3, "spent anew in each of 3 rounds"),
    ],
)
def test_each_condition_is_named_where_it_fails(
    change: dict[str, float], rounds: int, words: str
) -> None:
    found = Promise.from_json(SOUND | change).doubts(rounds=rounds)
    assert len(found) == 2, "the condition, and what the noise is worth"
    assert words in found[0]


def test_what_the_noise_is_worth_follows_from_the_noise_alone() -> None:
    """Flower's example: the sensitivity is a two-hundredth of what clipping allows."""
    promise = Promise(epsilon=5.0, delta=1e-5, sensitivity=0.01, clipping_norm=1.0)
    mu = 2 * promise.clipping_norm / promise.sigma
    assert promise.worth() > 10_000 > promise.epsilon
    assert promise.worth(rounds=4) == pytest.approx(
        Promise.from_json({**promise.to_json(), "clipping_norm": 2.0}).worth(), rel=1e-9
    ), "four rounds are one of twice the sensitivity"
    assert mu == pytest.approx(2 * 5 / (0.01 * math.sqrt(2 * math.log(1.25e5))))


def test_settings_are_read_by_the_names_that_apps_use() -> None:
    named = {"dp-epsilon": 0.5, "dp-delta": 1e-5, "dp-sensitivity": 2.0, "dp-clipping-norm": 1.0}
    assert promise_of(named) == Promise.from_json(SOUND)
    assert promise_of({"dp-epsilon": 0.5}) is None
    with pytest.raises(InvalidParameter, match="delta"):
        promise_of(named | {"dp-delta": 2.0})


def test_an_audit_of_a_capture_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = model_state(build("lenet", size=16, classes=4))
    settings = {
        "learning-rate": 0.1, "local-epochs": 1, "batch-size": 2, "num-server-rounds": 3,
        "dp-epsilon": 5.0, "dp-delta": 1e-5, "dp-sensitivity": 0.01, "dp-clipping-norm": 1.0,
    }  # fmt: skip
    Recorder(folder=tmp_path).write(
        Exchange(round=1, client="7", place="wire", received=state, sent=state, examples=2,
                 settings=settings)
    )  # fmt: skip
    config = AuditConfig.model_validate(
        {
            "model": {"builtin": "lenet", "kwargs": {"size": 16, "classes": 4}},
            "data": {"victims": "none", "shape": [3, 16, 16]},
            "captured": {"folder": str(tmp_path)},
            "threat": "B",
        }
    )
    (setting,) = make_plan(config, base=tmp_path, command="").settings
    findings = examine(setting.stage(letter="B", seed=0), (), letters=("B",)).findings
    (found,) = [finding for finding in findings if "differential privacy" in finding]
    assert "NOT given" in found
    assert "3 rounds" in found
