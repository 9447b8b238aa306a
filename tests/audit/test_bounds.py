from __future__ import annotations

import re

import pytest
import torch

from leakatlas import data, limits, models
from leakatlas.attacks.optimization.basic.dlg import DLG
from leakatlas.audit import audit, bounds, doctor
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, Protocol
from tests.conftest import build_stage


def test_epochs_that_no_budget_holds_are_refused_with_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "step_seconds", lambda live: 0.002)
    live = build_stage(protocol=FedAVG(epochs=1_000_000, batch_size=1), examples=2, clients=3)
    with pytest.raises(InvalidParameter) as raised:
        bounds.require_feasible(live, [], 300.0)
    words = (
        "FedAVG: 1,000,000 epochs x 2 batches x 3 clients x 1 rounds = 6,000,000 local steps of "
        "2 ms, 10 times over before any attack: 1.39 days; the budget is 5 minutes"
    )
    assert words in str(raised.value)
    bounds.require_feasible(live, [], 6_000_000 * 10 * 0.002 + 1)


def test_few_steps_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(live: object) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(bounds, "step_seconds", never)
    bounds.require_feasible(build_stage(protocol=FedAVG(epochs=500, batch_size=1)), [], 1e-9)


def test_timing_a_step_changes_nothing() -> None:
    live = build_stage(model="convnet-bn", settings={}, protocol=FedAVG(mode="train"))
    before = {n: t.clone() for n, t in live.federation.model.state_dict().items()}
    noise = torch.get_rng_state()
    assert bounds.step_seconds(live) > 0
    after = live.federation.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(noise, torch.get_rng_state())


def test_candidates_that_no_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    live = build_stage(examples=2, size=8)  # 2 x 3 x 8 x 8 values in float64
    monkeypatch.setattr(limits, "memory", lambda: 20_000_000)
    words = re.escape("dlg(restarts=1,000) needs 18.4 MB") + "|2,000 candidates x 2 x 3 x 8 x 8"
    bounds.require_feasible(live, [DLG(restarts=1_000)], 1.0)
    with pytest.raises(InvalidParameter, match=words):
        bounds.require_feasible(live, [DLG(restarts=2_000)], 1.0)


@pytest.mark.parametrize("protocol", [FedAVG(epochs=10**9), FedAVG(epochs=10**15, batch_size=1)])
def test_doctor_and_audit_refuse_rather_than_try(protocol: Protocol) -> None:
    model, batch = models.build("fc", size=8, widths=[4], classes=8), data.photos(8).subset([0, 1])
    for command in (doctor, audit):
        with pytest.raises(InvalidParameter, match=r"local steps of .* the budget is"):
            command(model, batch, protocol=protocol, threat="B")


def test_durations_are_told_in_fitting_units() -> None:
    told = [bounds.duration(s) for s in (0.5, 59, 90, 7200, 200_000, 1e8)]
    assert told == [
        "0.5 seconds",
        "59 seconds",
        "1.5 minutes",
        "2 hours",
        "2.31 days",
        "3.17 years",
    ]
