"""What becomes of a run: six words, and what a gate makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from leakatlas import data
from leakatlas.attacks.analytic.isolation.seer import SEER
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
from leakatlas.audit import Plan, Silent, Watch, carry_out
from leakatlas.audit.jobs import Job, run_job
from leakatlas.blocks.watch import MORE_TIME
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
from leakatlas.fl import FedSGD, ModelRef, View
from leakatlas.metrics.score import Scores, score
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
    plan = replace(small_plan, settings=(setting,), letters=("G",), attack_parameters={})
    job = Job(setting, SlowToPrepare(), "G", 0)
    run = run_job(job, plan, 0.05, None, Silent(), Watch())
    assert run.status == "cut short" and "budget" in run.reason


@pytest.mark.parametrize("in_process", [True, False])
def test_what_is_learned_in_too_little_time_is_a_cut_in_any_process(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch, in_process: bool, cache: Path
) -> None:
    """SEER asks for a thousand steps of training; no machine makes twenty in this time."""
    model = ModelRef("builtin", "convnet-bn", {"in_channels": 3, "size": 32, "classes": 8})
    setting = replace(
        small_plan.settings[0], attacks=("seer",), model=model.build(), model_ref=model,
        victims=data.photos(32).subset(range(4)), protocol=FedSGD(mode="train"),
    )  # fmt: skip
    plan = replace(small_plan, settings=(setting,), in_process=in_process, attack_parameters={})
    job = Job(setting, SEER.tuned(), "G", 0)
    run = run_job(job, plan, 0.05, None, Silent(), Watch())
    assert run.status == "cut short" and "budget" in run.reason
    assert run.notes["iterations_asked"] == 1_000 > run.notes["iterations_made"]
    assert not list(cache.glob("seer-*"))  # half-learned: not for the next run


def test_attacks_that_lack_time_are_listed_set_up_by_set_up(scripted: Plan) -> None:
    script(nothing)
    (run, *_) = carry_out(scripted).runs
    late = replace(run, status="refused", wants=MORE_TIME, scores=None, verdict="not tested")
    places = [("dlg", "a"), ("gias", "a"), ("dlg", "b"), ("dlg", "a")]
    runs = tuple(replace(late, attack=attack, setting=setting) for attack, setting in places)
    report = replace(carry_out(scripted), runs=runs, comparisons=(), realism=())
    assert f"refused: dlg, gias on a; dlg on b ({MORE_TIME})" in report.undecided()


def test_a_cut_run_leaves_the_audit_undecided_unless_all_came_out_already(scripted: Plan) -> None:
    def cut(view: View, watch: Clock) -> Reconstruction:
        found = nothing(view, watch)
        return replace(found, status="cut short", reason="the time budget ended")

    script(cut)
    report = carry_out(replace(scripted, letters=("B",), in_process=True))
    assert [run.status for run in report.runs if run.tried] == ["cut short"]
    assert any("cut short: scripted on one photo" in reason for reason in report.undecided())
    with pytest.raises(Undecided, match="cut short"):
        report.exceeds("P(psnr > 20 dB) > 0.05")
    (run,) = [run for run in report.runs if run.tried]
    exact = replace(run, attack="robbing_the_fed", status="complete", scores=_exact())
    assert not replace(report, runs=(run, exact)).undecided()
    stronger = replace(exact, letter="G")  # who knows more proves nothing of the weaker one
    assert replace(report, runs=(run, stronger)).undecided()
    elsewhere = replace(exact, target=1)
    assert replace(report, runs=(run, elsewhere)).undecided()
    late = replace(run, status="refused", scores=None, wants=MORE_TIME)
    assert replace(report, runs=(late, exact)).undecided() == ()
    assert replace(report, runs=(late, stronger)).undecided()
    lacking = replace(late, wants="give the grant labels")  # that is asked for, whatever came out
    assert replace(report, runs=(lacking, exact)).undecided()


def _exact() -> Scores:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return score(image, image, public=torch.rand(4, 3, 8, 8))


def test_an_active_attack_takes_every_target_in_turn(small_plan: Plan) -> None:
    """Otherwise a gate over all images would count those of whom nobody took hold as safe."""
    setting = replace(
        small_plan.settings[0], victims=data.photos(32).subset(range(3)), clients=3,
        targets=(0, 1, 2), attacks=("robbing_the_fed",),
    )  # fmt: skip
    report = carry_out(
        replace(small_plan, settings=(setting,), letters=("G",), attack_parameters={})
    )
    assert [run.target for run in report.runs] == [0, 1, 2]
    assert len(report.worst_case()["exact"]) == 3
    assert report.exceeds("P(psnr > 20 dB) > 0.9")
    assert report.spared() == ()


def test_clients_that_nobody_attacked_are_said(small_plan: Plan, tmp_path: Path) -> None:
    setting = replace(
        small_plan.settings[0], victims=data.photos(32).subset(range(3)), clients=3,
        targets=(2,), attacks=("robbing_the_fed",),
    )  # fmt: skip
    plan = replace(small_plan, settings=(setting,), letters=("G",), attack_parameters={})
    report = carry_out(plan)
    assert report.spared() == (
        "one photo: 1 of 3 clients were attacked, and all figures are theirs",
    )
    report.save(tmp_path)
    assert "1 of 3 clients were attacked" in (tmp_path / "report.html").read_text()


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
