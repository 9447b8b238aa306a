"""Which defenses keep a condition, and what is said of those that cannot be judged."""

from __future__ import annotations

import json
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leakatlas import data
from leakatlas.audit import Plan, Setting, parse_gate
from leakatlas.audit.recommend import Recommendation, menu_of, recommend
from leakatlas.audit.utility import Utility
from leakatlas.catalogue import frontier, registry
from leakatlas.catalogue.results import Measure, Result
from leakatlas.data import Box
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedSGD, ModelRef
from tests.audit.machine import MACHINE

EXACT = parse_gate("exact > 0")


@pytest.fixture
def one_digit(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A closed form that is exact on one digit."""
    monkeypatch.setattr("leakatlas.audit.recommend.price_of", priced)
    monkeypatch.setattr(
        "leakatlas.audit.recommend.registry.defense_keys",
        lambda: ("client_dp", "clipping", "fedkl"),
    )
    reference = ModelRef("builtin", "fc", {"in_channels": 1, "size": 8, "classes": 10,
                                           "widths": [32]})  # fmt: skip
    setting = Setting(
        name="one digit", model=reference.build(), model_ref=reference,
        victims=data.digits().subset([0]), protocol=FedSGD(), box=Box.unit(1), attacks=("rgap",),
    )  # fmt: skip
    return Plan(settings=(setting,), letters=("B",), seconds=None)


def priced(defenses: object, **_: object) -> Utility:
    """More noise costs more."""
    noise = [getattr(d, "noise_multiplier", 0.0) for d in defenses]  # type: ignore[attr-defined]
    return Utility(0.9 - 0.01 * sum(noise))


@pytest.fixture
def found(one_digit: Plan, tmp_path: Path) -> Recommendation:
    return recommend(one_digit, [EXACT], out=tmp_path)


def test_the_cheapest_that_keeps_the_conditions_comes_first(found: Recommendation) -> None:
    assert found.as_it_is.finding == "breaks" and found.as_it_is.values == (1.0,)
    names = [advice.name for advice in found.kept]
    assert names == [
        "client_dp, noise_multiplier = 0.01", "client_dp, noise_multiplier = 0.1",
        "client_dp, noise_multiplier = 1", "client_dp, noise_multiplier = 6",
    ]  # fmt: skip
    assert found.kept[-1].points == pytest.approx(6.0)


def test_a_scale_hides_nothing_and_its_weaker_forms_are_not_tried(found: Recommendation) -> None:
    broken = [advice.name for advice in found.advice if advice.finding == "breaks"]
    assert broken == ["clipping, max_norm = 0.1"]


def test_what_cannot_take_part_is_named_with_its_reason(found: Recommendation) -> None:
    assert "FedKL locks the scale and shift" in found.left_out["fedkl"]


def test_an_informed_adversary_is_asked_even_if_none_was_named(found: Recommendation) -> None:
    assert found.report.letters == ("B", "C")
    assert {run.letter for c in found.report.comparisons for run in c.runs} == {"C"}


def test_the_report_is_written_and_the_answer_is_plain_json(
    found: Recommendation, tmp_path: Path
) -> None:
    kept = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert next(c["name"] for c in kept["comparisons"]) == "as configured"
    assert json.loads(json.dumps(found.to_json()))["advice"][0]["finding"] == "keeps"


def test_nothing_is_added_where_no_condition_holds(one_digit: Plan, tmp_path: Path) -> None:
    found = recommend(one_digit, [parse_gate("exact > 1")], out=tmp_path)
    assert found.as_it_is.finding == "keeps" and found.advice == ()


def test_an_attack_that_did_not_run_leaves_it_undecided(one_digit: Plan, tmp_path: Path) -> None:
    setting = replace(one_digit.settings[0], attacks=("april",))  # needs a transformer
    plan = replace(one_digit, settings=(setting,))
    found = recommend(plan, [EXACT], out=tmp_path)
    assert found.as_it_is.finding == "undecided"
    assert {advice.finding for advice in found.advice} == {"undecided"}
    assert all(advice.values == (None,) for advice in found.advice)


def test_a_configured_defense_is_tried_at_its_other_strengths(one_digit: Plan) -> None:
    pruned = replace(one_digit.settings[0], defenses=(registry.defense("clipping", max_norm=1.0),))
    menu, _ = menu_of(replace(one_digit, settings=(pruned,)), {})
    assert [name for name, _ in menu["clipping"]] == [
        "clipping, max_norm = 4", "clipping, max_norm = 0.1",
    ]  # fmt: skip
    assert all(len(defenses) == 2 for _, defenses in menu["client_dp"])


def figure(name: str, value: float, note: str = "") -> Measure:
    return Measure(name=name, value=value, interval=(value, value), n=10, note=note)


def test_what_stopped_most_on_the_frontier_is_tried_first(
    one_digit: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the network that was worst for it, under the same kind of protocol, and of one whose
    buffers tell of the batch only for a model that has such.
    """
    measures = (
        figure("recovered | fresh | clipping, max_norm=0.1", 0.0),
        figure("recovered | trained | clipping, max_norm=0.1", 0.25),
        figure("loss | trained | clipping, max_norm=0.1", 3.0),
        figure("recovered | fresh, FedAVG | clipping, max_norm=0.1", 1.0),
        figure("recovered | batch norm | clipping, max_norm=0.1", 1.0),
        figure("recovered | fresh | client_dp, noise_multiplier=6", 0.75),
    )
    result = Result.model_validate(
        {"schema": "leakatlas/result/1", "kind": "benchmark", "key": "frontier", "code_version": 1,
         "recipe": {"study": "frontier"}, "hardware": "2 CPU cores", "seeds": [0],
         "measures": measures, "command": "leakatlas bench frontier", "date": "2026-01-31"}
    )  # fmt: skip
    expected = frontier.expectations([result], local=False, batch_norm=False)
    assert list(menu_of(one_digit, expected)[0]) == ["clipping", "client_dp"]
    with_buffers = frontier.expectations([result], local=False, batch_norm=True)
    assert with_buffers["clipping, max_norm=0.1"].network == "batch norm"
    monkeypatch.setattr("leakatlas.audit.recommend.results.load", lambda folder: (result,))
    found = recommend(one_digit, [EXACT], out=tmp_path)
    said = {advice.name: advice.expected for advice in found.advice}
    assert said["clipping, max_norm = 0.1"] == (
        "25% [25%, 25%] of 10 recovered at +3.0 [+3.0, +3.0] points (trained)"
    )
    assert said["client_dp, noise_multiplier = 1"] == ""


@pytest.mark.parametrize("seconds", [12.0, 1000.0])
@pytest.mark.parametrize("where", [
    "leakatlas.audit.run.examine",
    "leakatlas.audit.recommend.menu_of",
    "leakatlas.audit.compare._playable",
    "leakatlas.audit.recommend.price_of",
])  # fmt: skip
def test_its_budget_ends_it_whatever_it_is_doing(
    one_digit: Plan, where: str, seconds: float, cache: object, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Under a clock of its own; what was not reached is told."""
    MACHINE.now, MACHINE.load, MACHINE.alarm = 0.0, lambda now: 1.0, None
    monkeypatch.setattr("time.perf_counter", lambda: MACHINE.now)
    monkeypatch.setattr("signal.setitimer", MACHINE.set_alarm)
    really = pkgutil.resolve_name(where)

    def slow(*arguments: Any, **named: Any) -> Any:
        MACHINE.work(seconds)
        return really(*arguments, **named)

    monkeypatch.setattr(where, slow)
    found = recommend(
        replace(one_digit, seconds=30.0, in_process=True), [EXACT], out=tmp_path, begun=-2.0
    )
    assert MACHINE.now + 2 <= 1.1 * 30 + 15 and MACHINE.alarm is None
    assert (tmp_path / "report.json").is_file()
    told = {advice.name.partition(",")[0] for advice in found.advice} | {*found.left_out}
    assert {"client_dp", "clipping", "fedkl"} <= told
    if where.endswith("price_of"):
        unpriced = [a for a in found.advice if a.accuracy is None]
        assert unpriced and all("before its price was measured" in a.reason for a in unpriced)
    elif seconds > 30:
        assert found.undecided and not found.kept


def test_an_aim_is_needed(one_digit: Plan, tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="give fail_on"):
        recommend(one_digit, [], out=tmp_path)
