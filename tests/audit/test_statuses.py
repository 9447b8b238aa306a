"""What becomes of a run: six words, and what a gate makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from leakatlas.attacks.api import (
    ActiveAttack,
    Attack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.audit import Plan, Watch, carry_out
from leakatlas.blocks.watch import Watch as Clock
from leakatlas.catalogue import registry
from leakatlas.errors import (
    InvalidInput,
    InvalidParameter,
    NotGranted,
    Undecided,
    UnknownName,
    UnsupportedModel,
)
from leakatlas.fl import View
from leakatlas.threat import Grant, Knowledge

PASSIVE = Knowledge.UPDATES | Knowledge.BASIC


@attack("scripted", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Does what the test says."""

    script: ClassVar[Callable[[View, Clock], Reconstruction]]
    wanted: ClassVar[frozenset[Grant]] = frozenset()
    opinion: ClassVar[Callable[[View], Outlook]] = lambda view: Outlook("unknown", "")

    def grants(self) -> frozenset[Grant]:
        return type(self).wanted

    def outlook(self, view: View) -> Outlook:
        return type(self).opinion(view)

    def run(self, view: View, *, generator: torch.Generator, watch: Clock) -> Reconstruction:
        return type(self).script(view, watch)


@pytest.fixture
def scripted(small_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """A plan of a scripted attack under B and a quick one under G."""
    load = registry.load_attack

    def load_attack(key: str) -> type[Any]:
        return Scripted if key == "scripted" else load(key)

    monkeypatch.setattr(registry, "load_attack", load_attack)
    monkeypatch.setattr(Scripted, "wanted", frozenset())
    setting = replace(small_plan.settings[0], attacks=("scripted", "robbing_the_fed"))
    yield replace(small_plan, settings=(setting,), letters=("B", "G"), attack_parameters={})


def script(what: Callable[[View, Clock], Reconstruction]) -> None:
    Scripted.script = staticmethod(what)


def raising(problem: BaseException) -> Callable[[View, Clock], Reconstruction]:
    def run(view: View, watch: Clock) -> Reconstruction:
        raise problem

    return run


def nothing(view: View, watch: Clock) -> Reconstruction:
    return nothing_found(tuple(view.input_shape), "nothing there")


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("derivative not implemented"),
        ZeroDivisionError("division by zero"),
        MemoryError(),
        AssertionError(),
        KeyError("x"),
        SystemExit(0),
    ],
    ids=lambda p: type(p).__name__,
)
def test_whatever_an_attack_raises_is_its_own_error_and_the_others_go_on(
    scripted: Plan, tmp_path: Path, problem: BaseException
) -> None:
    script(raising(problem))
    report = carry_out(scripted, out=tmp_path)
    runs = {run.attack: run for run in report.runs}
    crashed = runs["scripted"]
    assert (crashed.status, crashed.verdict) == ("error", "not tested")
    assert crashed.reason.startswith(type(problem).__name__)
    assert "in run\n" in crashed.trace and type(problem).__name__ in crashed.trace
    assert runs["robbing_the_fed"].verdict == "exact leak"
    kept = [json.loads(f.read_text())["run"] for f in (tmp_path / "runs").glob("*.json")]
    assert [run["trace"] for run in kept if run["attack"] == "scripted"] == [crashed.trace]
    assert any("scripted crashed" in reason for reason in report.undecided())
    script(nothing)  # mended: it is run again, and the crash is not what is remembered
    assert {r.attack: r.status for r in carry_out(scripted, out=tmp_path).runs}[
        "scripted"
    ] == "failed"


@pytest.mark.parametrize(
    ("problem", "status", "undecided"),
    [
        (NotGranted("it reads labels"), "refused", True),
        (InvalidInput("give more images"), "refused", True),
        (UnsupportedModel("no linear layer"), "not applicable", False),
    ],
)
def test_a_refusal_and_a_theorem_are_no_crashes(
    scripted: Plan, problem: Exception, status: str, undecided: bool
) -> None:
    script(raising(problem))
    report = carry_out(replace(scripted, letters=("G",)))
    run = next(r for r in report.runs if r.attack == "scripted")
    assert (run.status, run.reason, run.verdict) == (status, str(problem), "not tested")
    assert bool(report.undecided()) is undecided


def test_an_attack_that_finds_nothing_was_tried(scripted: Plan) -> None:
    script(nothing)
    report = carry_out(replace(scripted, letters=("B",)))
    run = next(r for r in report.runs if r.attack == "scripted")
    assert (run.status, run.reason) == ("failed", "nothing there")
    assert run.verdict == "not demonstrated" and run.tried
    assert report.undecided() == () and not report.exceeds("exact > 0")


def test_a_crash_when_asked_is_an_error_too(scripted: Plan) -> None:
    def opinion(view: View) -> Outlook:
        raise IndexError("no such layer")

    Scripted.opinion = staticmethod(opinion)
    try:
        report = carry_out(scripted)
    finally:
        del Scripted.opinion
        Scripted.opinion = staticmethod(lambda view: Outlook("unknown", ""))
    run = next(r for r in report.runs if r.attack == "scripted")
    assert run.status == "error" and "no such layer" in run.reason and run.trace
    assert any("crashed" in reason for reason in report.undecided())


def test_a_missing_grant_is_something_that_the_user_could_give(
    scripted: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(nothing)
    monkeypatch.setattr(Scripted, "wanted", frozenset({Grant.BATCH_BN}))
    report = carry_out(scripted)
    run = next(r for r in report.runs if r.attack == "scripted")
    assert run.status == "refused" and "batch_bn" in run.wants
    assert any("give the grant batch_bn" in reason for reason in report.undecided())


def test_letters_that_leave_an_attack_out_decide_that(small_plan: Plan) -> None:
    report = carry_out(replace(small_plan, letters=("B",)))
    run = next(r for r in report.runs if r.attack == "robbing_the_fed")
    assert (run.status, run.wants, run.letter) == ("refused", "", "")
    assert report.undecided() == ()


def test_nothing_tried_for_a_letter_is_undecided_and_never_green(small_plan: Plan) -> None:
    report = carry_out(replace(small_plan, letters=("A", "B")))
    assert report.undecided() == ("nothing was tried for letter A",)
    assert {v.letter: v.verdict for v in report.verdicts()}["A"] == "not tested"
    with pytest.raises(Undecided, match="nothing was tried for letter A"):
        report.exceeds("P(psnr > 90 dB) > 0.05")
    assert report.exceeds("P(psnr > 90 dB) > 0.05", allow_undecided=True) is False
    assert report.exceeds("P(psnr > 1 dB) > 0.05")  # what came out counts


def test_no_attacks_at_all_are_no_all_clear(small_plan: Plan) -> None:
    setting = replace(small_plan.settings[0], attacks=())
    report = carry_out(
        replace(small_plan, settings=(setting,), letters=("B",), attack_parameters={})
    )
    for condition in ("P(psnr > 20 dB) > 0.05", "mean(mse) < 1", "exact < 1"):
        with pytest.raises(Undecided):
            report.exceeds(condition)


def test_a_stopped_audit_is_undecided(small_plan: Plan) -> None:
    stop = Watch()
    stop.stop()
    report = carry_out(replace(small_plan, letters=("B",)), stop=stop)
    assert "the audit was stopped before its end" in report.undecided()


@attack("slow_to_prepare", needs=PASSIVE | Knowledge.MANIPULATION)
@dataclass(frozen=True, kw_only=True)
class SlowToPrepare(ActiveAttack):
    """Its preparation is cut, its read-out is not."""

    def tamper(self, view: View, *, generator: torch.Generator, watch: Clock) -> Tampering | None:
        if view.rounds:
            return None
        for _ in watch.steps(10**9):
            pass
        return Tampering(sent=TamperedModel.of(view.model), key={})

    def run(self, view: View, *, generator: torch.Generator, watch: Clock) -> Reconstruction:
        return Reconstruction(images=torch.zeros(1, *view.input_shape))


def test_a_cut_in_tampering_is_a_cut_of_the_run(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "load_attack", lambda key: SlowToPrepare)
    setting = replace(small_plan.settings[0], attacks=("slow_to_prepare",))
    plan = replace(
        small_plan, settings=(setting,), letters=("G",), attack_parameters={}, seconds=0.05
    )
    run = carry_out(plan).runs[0]
    assert run.status == "cut short" and "budget" in run.reason


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"dlgg": {"steps": 1}}, UnknownName, "Did you mean 'dlg'"),
        ({"dlg": {"stpes": 1}}, InvalidParameter, "no parameter 'stpes'"),
        ({"spear": {"samples": 1}}, InvalidParameter, "not among the chosen attacks"),
        ({"dlg": {"steps": 1}, "DLG": {"steps": 2}}, InvalidParameter, "names dlg twice"),
    ],
)
def test_attack_parameters_without_effect_are_errors(
    small_plan: Plan,
    parameters: Mapping[str, Mapping[str, Any]],
    error: type[Exception],
    words: str,
) -> None:
    setting = replace(small_plan.settings[0], attacks=("dlg",))
    with pytest.raises(error, match=words):
        carry_out(
            replace(small_plan, settings=(setting,), letters=("B",), attack_parameters=parameters)
        )


def test_aliases_of_attacks_work(small_plan: Plan) -> None:
    setting = replace(small_plan.settings[0], attacks=("DLG", "dlg"))
    plan = replace(
        small_plan, settings=(setting,), letters=("A",), attack_parameters={"DLG": {"steps": 2}}
    )
    (run,) = carry_out(plan).runs
    assert run.attack == "dlg" and run.recipe["attack"]["parameters"]["steps"] == 2


def test_two_settings_of_one_name_are_refused(small_plan: Plan) -> None:
    with pytest.raises(InvalidParameter, match="Two settings are called 'one photo'"):
        replace(small_plan, settings=small_plan.settings * 2)


def test_a_surrogate_of_another_shape_is_refused(small_plan: Plan) -> None:
    from leakatlas import data

    with pytest.raises(InvalidInput, match=r"surrogate images have shape \(3, 16, 16\)"):
        replace(small_plan.settings[0], surrogate=data.patches(16, 4, part="surrogate"))
