"""A whole audit under a clock of its own: machines of any load, and no waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from leakatlas import data
from leakatlas.attacks.api import (
    ActiveAttack,
    Attack,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
)
from leakatlas.audit import Plan, Report, carry_out
from leakatlas.audit.budget import COMPARISONS, REPORT
from leakatlas.audit.utility import Utility
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.fl import View
from leakatlas.params import PositiveInt
from leakatlas.threat import Knowledge
from tests.audit.machine import MACHINE, Load

PASSIVE = Knowledge.UPDATES | Knowledge.BASIC
BUDGET = 60.0


@attack("matching", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Matching(Attack):
    """Takes 20 ms for an iteration, and finds the image's mean."""

    each: ClassVar[float] = 0.02
    steps: PositiveInt = 400

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        MACHINE.work(0.1)
        for _ in watch.steps(self.steps, stretches=True):
            MACHINE.work(self.each)
        return Reconstruction(images=torch.full((1, *view.input_shape), 0.5))


@attack("dear", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Dear(Matching):
    """The same for a second an iteration."""

    each: ClassVar[float] = 1.0


@attack("learning", needs=PASSIVE | Knowledge.MANIPULATION)
@dataclass(frozen=True, kw_only=True)
class Learning(ActiveAttack):
    """Learns for 20 s on an idle machine, if it is let."""

    steps: PositiveInt = 1_000

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        if view.rounds:
            return None
        for _ in watch.steps(self.steps, stretches=True):
            MACHINE.work(0.02)
        return Tampering(sent=TamperedModel.of(view.model), key={})

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        return Reconstruction(images=torch.zeros(1, *view.input_shape))


OWN: dict[str, type[Attack]] = {"matching": Matching, "dear": Dear, "learning": Learning}


@pytest.fixture
def plan(small_plan: Plan, monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Plan]:
    """Three attacks on three clients, and two sets of defenses to compare."""
    load = registry.load_attack
    monkeypatch.setattr(registry, "load_attack", lambda key: OWN.get(key) or load(key))
    monkeypatch.setattr("time.perf_counter", lambda: MACHINE.now)
    monkeypatch.setattr("signal.setitimer", MACHINE.set_alarm)
    monkeypatch.setattr("leakatlas.audit.compare.price_of", lambda *_, **__: Utility(0.9))
    setting = replace(
        small_plan.settings[0], victims=data.photos(32).subset(range(3)), clients=3,
        targets=(0, 1, 2), attacks=("matching", "learning"),
    )  # fmt: skip
    yield replace(
        small_plan, settings=(setting,), letters=("B", "G"), attack_parameters={},
        alternatives={"clipping": (registry.defense("clipping"),)}, seconds=BUDGET,
        in_process=True,
    )  # fmt: skip


def audited(plan: Plan, load: Load) -> tuple[Report, float]:
    """The report, and how long it took on a machine of this load."""
    MACHINE.now, MACHINE.load = 0.0, load
    return carry_out(plan), MACHINE.now


def words(report: Report) -> list[tuple[object, ...]]:
    """All that a reader is told of the runs, but for figures."""
    every = (*report.runs, *(run for c in report.comparisons for run in c.runs))
    return [
        (run.setting, run.attack, run.target, run.status, run.verdict, run.defenses)
        for run in sorted(every, key=lambda run: (run.attack, run.target, run.defenses))
    ]


def idle(now: float) -> float:
    return 1.0


def busy(now: float) -> float:
    return 2.5


def busier(now: float) -> float:
    """Somebody starts something while the audit runs."""
    return 1.0 if now < 15.0 else 2.2


def restless(now: float) -> float:
    return 2.0 if int(now) % 2 else 1.0


@pytest.mark.parametrize("load", [busy, busier, restless])
def test_two_runs_on_machines_of_different_load_end_with_the_same_words(
    plan: Plan, load: Load
) -> None:
    report, spent = audited(plan, idle)
    other, longer = audited(plan, load)
    assert words(report) == words(other)
    assert report.undecided() == other.undecided() == ()
    assert all(run.status == "complete" for run in report.runs)
    assert spent <= BUDGET and longer <= BUDGET


def test_every_run_is_as_long_as_its_plan_says(plan: Plan) -> None:
    report, _ = audited(plan, idle)
    for run in report.runs:
        if run.attack == "matching":
            assert run.recipe["attack"]["parameters"]["steps"] >= Matching.fewest
            assert "iterations_made" not in run.notes  # the plan was kept
        else:  # learned in the time there was, and said
            assert 20 <= run.notes["iterations_made"] < run.notes["iterations_asked"] == 1_000


@pytest.mark.parametrize("slow", [1.0, 10.0, 40.0])
@pytest.mark.parametrize("budget", [30.0, 60.0])
def test_a_budget_is_kept_on_any_machine(plan: Plan, budget: float, slow: float) -> None:
    """What does not fit is left out before it is begun, and makes the audit undecided."""
    report, spent = audited(replace(plan, seconds=budget), lambda now: slow)
    assert spent <= 1.1 * budget + 15
    left_out = [run for run in report.runs if not run.tried]
    assert bool(left_out) <= bool(report.undecided())
    if slow == 1.0:
        assert not report.undecided()


def test_comparisons_and_attacks_do_not_starve_each_other(plan: Plan) -> None:
    (setting,) = plan.settings
    greedy = replace(setting, attacks=("dear", "matching"))
    ended: list[tuple[str, float]] = []

    class Timing:
        def begin(self, total: int) -> None: ...
        def run(self, name: str, fraction: float, note: str = "") -> None: ...
        def done(self, run: Any) -> None:
            ended.append((run.attack, MACHINE.now))

    MACHINE.now, MACHINE.load = 0.0, idle
    report = carry_out(replace(plan, settings=(greedy,), letters=("B",)), listener=Timing())
    assert MACHINE.now <= BUDGET
    assert all(c.runs and all(r.tried for r in c.runs) for c in report.comparisons)
    of_attacks = ended[len(report.runs) - 1][1]
    assert of_attacks <= (1 - COMPARISONS - REPORT) * BUDGET * 1.05
    left_out = [run for run in report.runs if not run.tried]
    assert {run.attack for run in left_out} == {"dear"}  # three times 20 s
    assert len(left_out) == 2  # one of them in what the others leave
    assert all("would not fit" in run.reason for run in left_out)


def test_a_defense_whose_clients_alone_take_too_long_is_left_out_and_said(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipping = type(plan.alternatives["clipping"][0])
    monkeypatch.setattr(clipping, "workload", lambda self, model: 1e5)
    monkeypatch.setattr("leakatlas.audit.compare._gradient_seconds", lambda setting: 0.01)
    rounds: list[object] = []
    play = type(plan.settings[0].stage(letter="B", seed=0).federation).play_round

    def played(self: Any, **rest: Any) -> Any:
        MACHINE.work(0.01)
        rounds.append(self.defenses)
        return play(self, **rest)

    monkeypatch.setattr("leakatlas.fl.rounds.Federation.play_round", played)
    report, spent = audited(plan, idle)
    assert spent <= BUDGET
    named = {c.name: c.runs for c in report.comparisons}
    assert all("would not fit; under clipping" in run.reason for run in named["clipping"])
    assert all(run.tried for run in named["as configured"])
    assert any("would not fit" not in r and "clip" not in r for r in report.undecided())
    assert not any(rounds)  # none with a defense was played
