"""Which side of the two verdicts a setting is, what the other side has, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from leakatlas import data
from leakatlas.audit import Plan, Setting, carry_out
from leakatlas.audit.budget import COMPARISONS, OTHER_SIDE, REPORT, Budget, other_side
from leakatlas.audit.deadline import Deadline
from leakatlas.audit.listener import Silent
from leakatlas.audit.realism import EVAL, ORACLES, cautions_of, other_sides, pair_of, record_of
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.data import Box
from leakatlas.fl import FedAVG, FedSGD, ModelRef
from leakatlas.threat import Grant, Vantage

FC = ModelRef("builtin", "fc", {"in_channels": 3, "size": 16, "classes": 8, "widths": [8]})


class Normed(nn.Sequential):
    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * 14 * 14, 8),
        )


def a_setting(**changes: Any) -> Setting:
    known: dict[str, Any] = {
        "name": "s",
        "model": FC.build(),
        "model_ref": FC,
        "victims": data.photos(16).subset([0, 1]),
        "protocol": FedSGD(),
        "box": Box.unit(3),
        "attacks": ("inverting_gradients",),
    }
    return Setting(**(known | changes))


ONE = {"victims": data.photos(16).subset([0])}
SUM = {"protocol": FedAVG(shuffle=True), "clients": 2, "vantage": Vantage.AGGREGATE}


@pytest.mark.parametrize(
    ("changes", "separates"),
    [
        (ONE, []),
        ({}, [Grant.LABELS]),
        (ONE | {"vantage": Vantage.AGGREGATE}, [Grant.LABELS]),
        (ONE | {"defenses": (registry.defense("clipping"),)}, [Grant.LABELS]),
        (ONE | {"protocol": FedSGD(shared=("layers.*",))}, [Grant.LABELS]),
        (ONE | {"model": Normed()}, [Grant.BATCH_BN]),
        ({"protocol": FedAVG(shuffle=True)}, [Grant.LABELS, Grant.BATCH_ORDER]),
        (SUM, [Grant.LABELS]),  # there is no one order
    ],
)
def test_what_an_oracle_would_add(changes: Mapping[str, Any], separates: list[Grant]) -> None:
    pair = pair_of(a_setting(**changes))
    assert pair.configured == "as deployed"
    assert pair.separates == tuple(ORACLES[grant] for grant in separates)
    assert (pair.other is None) is (not separates)
    if pair.other is not None:
        assert pair.other.grants == frozenset(separates)
        assert pair.other.protocol.mode == pair.setting.protocol.mode


@pytest.mark.parametrize("model", [Normed(), nn.Sequential(nn.Flatten(), nn.Dropout(), FC.build())])
def test_a_client_in_train_mode_computes_in_eval_mode_for_the_bound(model: nn.Module) -> None:
    if not isinstance(model, Normed):
        model = nn.Sequential(nn.Dropout(), FC.build())
    pair = pair_of(a_setting(model=model, protocol=FedAVG(mode="train")))
    assert EVAL in pair.separates and pair.other is not None
    assert pair.other.protocol.mode == "eval" and pair.setting.protocol.mode == "train"
    assert EVAL not in pair_of(a_setting(model=model, protocol=FedAVG(mode="eval"))).separates


def test_granted_oracles_make_a_setting_the_upper_bound() -> None:
    pair = pair_of(a_setting(grants=frozenset({Grant.LABELS, Grant.PIXEL_RANGE})))
    assert pair.configured == "diagnostic upper bound" and pair.other is not None
    assert pair.other.grants == {Grant.PIXEL_RANGE}
    assert pair.separates == (ORACLES[Grant.LABELS],)


def test_without_the_private_batch_there_is_nothing_to_grant() -> None:
    pair = pair_of(replace(a_setting(), known=False))
    assert pair.other is None and pair.separates and "not at hand" in pair.reason
    assert pair_of(a_setting(), wanted=False).reason == "left out (upper_bound: false)"


def test_the_record_names_what_a_laboratory_holds_fixed() -> None:
    setting = a_setting(model=Normed(dropout=0.5), protocol=FedAVG(mode="train", epochs=2))
    record = record_of(setting)
    assert record["mode"] == "train" and record["batchnorm_layers"] == 1 and record["dropout"]
    assert record["local_steps"] == 2 and record["resolution"] == [3, 16, 16]
    assert record["weights"] == "initial, never trained"
    eval_mode = replace(setting, protocol=FedAVG(mode="eval"), weights="global.safetensors")
    said = " ".join(cautions_of(eval_mode, record_of(eval_mode)))
    assert "eval mode" in said and "16 x 16" in said and "initial" not in said
    assert "eval mode" not in " ".join(cautions_of(setting, record))


def test_recording_leaves_the_model_as_it_was() -> None:
    model = Normed(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    record_of(a_setting(model=model))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_both_verdicts_stand_in_one_budget() -> None:
    stop = Watch()
    budget = Budget(0.0, 1e9, compares=True, other_side=0.2)
    attacks, sides, whole = (
        watch.remaining() or 0.0
        for watch in (budget.attacks(stop), budget.other_sides(stop), budget.comparisons(stop))
    )
    assert attacks < sides < whole
    assert sides - attacks == pytest.approx(0.2 * (1 - COMPARISONS - REPORT) * 1e9, rel=1e-3)
    one_sided = Budget(0.0, 1e9, compares=True).attacks(stop).remaining() or 0.0
    assert one_sided == pytest.approx(sides, rel=1e-6)


@pytest.mark.parametrize("attacks", [0, 1, 3, 5, 10, 100])
def test_a_repeated_attack_has_the_time_of_each_other(attacks: int) -> None:
    share = other_side(attacks)
    assert OTHER_SIDE[0] <= share <= OTHER_SIDE[1]
    if OTHER_SIDE[0] < share < OTHER_SIDE[1]:
        assert share == pytest.approx((1 - share) / attacks)


def test_an_audit_runs_the_other_side_and_keeps_the_gate_on_what_was_configured() -> None:
    plan = Plan(
        settings=(a_setting(),),
        letters=("B",),
        attack_parameters={"inverting_gradients": {"steps": 3}},
        seconds=3_600.0,
        rehearsal=False,
    )
    report = carry_out(plan)
    (found,) = report.realism
    assert [run.setting for run in found.runs] == ["upper bound: s"]
    assert "labels" in found.runs[0].reads and "labels" not in report.runs[0].reads
    assert {len(report.worst_case()["psnr"]), len(report.runs)} == {2, 1}
    plain = report.to_json()
    assert plain["realism"][0]["record"]["granted"] == []
    assert plain["verdicts"][0]["upper_bound_by"]["setting"] in ("s", "upper bound: s")
    assert found.runs[0].recipe["attack"] == report.runs[0].recipe["attack"]
    without = carry_out(replace(plan, upper_bound=False))
    assert without.realism[0].reason == "left out (upper_bound: false)"
    assert without.standings()[0].bound == "not tested" and without.undecided() == ()


def test_labels_that_were_read_give_way_to_granted_ones() -> None:
    """The rehearsed rule's answer is a parameter of the run; the bound does not inherit it."""
    plan = Plan(
        settings=(a_setting(),),
        letters=("B",),
        attack_parameters={"inverting_gradients": {"steps": 2, "restarts": 2}},
        seconds=3_600.0,
    )
    report = carry_out(plan)
    (run,), (repeated,) = report.runs, report.realism[0].runs
    assert run.recipe["attack"]["parameters"]["labels"] != []
    assert repeated.recipe["attack"]["parameters"]["labels"] == []
    assert "labels" in repeated.reads and repeated.recipe["rehearsal"] == {}
    same = ("restarts", "distance", "optimizer", "schedule", "lr", "tv_weight")
    for name in same:
        ours, theirs = (r.recipe["attack"]["parameters"][name] for r in (run, repeated))
        assert ours == theirs, name


def test_a_budget_that_is_spent_asks_nothing_of_the_other_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*_: object) -> list[object]:
        raise AssertionError("no attack is asked whether it may start")

    monkeypatch.setattr("leakatlas.audit.realism._jobs", asked)
    pairs = [pair_of(a_setting(), wanted=True)]
    plan = Plan(settings=(pairs[0].setting,), letters=("B",), seconds=30.0)
    (found,) = other_sides(
        pairs, plan, [], [], Watch(0.0), None, Silent(), Watch(), Deadline(0.0, None)
    )
    assert found.runs == () and found.reason == "the budget ended before it"
