"""A budget is kept whatever was expected, under a clock of its own: within 1.1 of it and 15 s."""

from __future__ import annotations

import itertools
import json
import pkgutil
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from leakatlas import data
from leakatlas.attacks.api import Attack, Reconstruction, attack
from leakatlas.audit import Plan, Report, carry_out
from leakatlas.audit.deadline import LATE, Deadline
from leakatlas.audit.ready import GRADIENTS
from leakatlas.audit.run import LEFT
from leakatlas.audit.schedule import PROBE, pace
from leakatlas.bench.spawned import Spawned
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.fl import View
from leakatlas.params import PositiveInt
from leakatlas.threat import Knowledge
from tests.audit.machine import MACHINE

PASSIVE = Knowledge.UPDATES | Knowledge.BASIC
HANGS = 1e6
"""Seconds that stand for ever."""


@attack("deceptive", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Deceptive(Attack):
    """Quick while it is timed, and so many times slower when it is run."""

    slower: ClassVar[float] = 1.0
    steps: PositiveInt = 400

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        times = self.slower if self.steps > PROBE else 1.0
        MACHINE.work(0.1 * times)
        for _ in watch.steps(self.steps, stretches=True):
            MACHINE.work(0.02 * times)
        return Reconstruction(images=torch.full((1, *view.input_shape), 0.5))


@attack("asleep", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Asleep(Attack):
    """Never looks at the clock."""

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        MACHINE.work(HANGS)
        raise AssertionError("nobody waits for this")


OWN: dict[str, type[Attack]] = {"deceptive": Deceptive, "asleep": Asleep}


@pytest.fixture
def plan(small_plan: Plan, monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[Plan]:
    """An attack on three clients, and a set of defenses to compare with."""
    load = registry.load_attack
    monkeypatch.setattr(registry, "load_attack", lambda key: OWN.get(key) or load(key))
    monkeypatch.setattr("time.perf_counter", lambda: MACHINE.now)
    monkeypatch.setattr("signal.setitimer", MACHINE.set_alarm)
    setting = replace(
        small_plan.settings[0], victims=data.photos(32).subset(range(3)), clients=3,
        targets=(0, 1, 2), attacks=("deceptive",),
    )  # fmt: skip
    yield replace(
        small_plan, settings=(setting,), letters=("B",), attack_parameters={}, in_process=True,
        alternatives={"clipping": (registry.defense("clipping"),)},
    )  # fmt: skip


def audited(plan: Plan, budget: float, **named: Any) -> tuple[Report, float]:
    """The report and how long it took, on an idle machine."""
    MACHINE.now, MACHINE.load, MACHINE.alarm = 0.0, lambda now: 1.0, None
    report = carry_out(replace(plan, seconds=budget), **named)
    assert MACHINE.alarm is None
    return report, MACHINE.now


def expensive(monkeypatch: pytest.MonkeyPatch, where: str, seconds: float) -> None:
    """What is computed there takes so much longer."""
    really: Callable[..., Any] = pkgutil.resolve_name(where)

    def slow(*arguments: Any, **named: Any) -> Any:
        MACHINE.work(seconds)
        return really(*arguments, **named)

    monkeypatch.setattr(where, slow)


def told(report: Report) -> None:
    """Every job has an entry, and what was not tried leaves the audit undecided."""
    named = [(run.attack, run.target) for run in report.runs]
    assert len(set(named)) == len(named)
    strongest = any(run.scores is not None for run in report.runs)
    assert all(bool(c.runs) == strongest for c in report.comparisons)
    if any(not run.tried for run in report.runs):
        assert report.undecided()


@pytest.mark.parametrize("budget", [30.0, 60.0, 300.0])
@pytest.mark.parametrize("slower", [3.0, 10.0, 100.0])
def test_estimates_that_were_far_too_low(
    plan: Plan, budget: float, slower: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Deceptive, "slower", slower)
    report, spent = audited(plan, budget)
    assert spent <= 1.1 * budget + 15
    told(report)
    assert len(report.runs) == 3 and any(run.tried for run in report.runs)


@pytest.mark.parametrize("budget", [30.0, 120.0])
def test_an_attack_that_never_looks_at_the_clock(plan: Plan, budget: float) -> None:
    (setting,) = plan.settings
    both = replace(plan, settings=(replace(setting, attacks=("asleep", "deceptive")),))
    report, spent = audited(both, budget)
    assert budget <= spent <= 1.1 * budget + 15
    assert len(report.runs) == 6
    told(report)


@pytest.mark.parametrize("where", [
    "leakatlas.audit.run.examine",  # a diagnosis that takes a thousand seconds
    "leakatlas.fl.rounds.Federation.play_round",  # one round of a network that is too large
    "leakatlas.audit.plan.Setting.stage",
    "leakatlas.audit.plan.Setting.readable",
    "leakatlas.audit.run.require_feasible",
    "leakatlas.audit.compare.price_of",
    "leakatlas.audit.iterating.timed",
    "leakatlas.audit.iterating.readied",
])  # fmt: skip
@pytest.mark.parametrize("seconds", [12.0, 1000.0])
def test_a_step_that_takes_longer_than_the_budget(
    plan: Plan, where: str, seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expensive(monkeypatch, where, seconds)
    report, spent = audited(plan, 30.0, out=tmp_path)
    assert spent <= 1.1 * 30 + 15
    told(report)
    assert len(report.runs) == (3 if report.diagnoses else 1)
    assert json.loads((tmp_path / "report.json").read_text())["undecided"] == [*report.undecided()]


def test_who_was_interrupted_before_anything_was_tried_hears_what_would_be_enough(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was timed but the round that the examination played: it gives the price."""
    expensive(monkeypatch, "leakatlas.fl.rounds.Federation.play_round", 0.6)
    expensive(monkeypatch, "leakatlas.audit.iterating.timed", 1000.0)
    report, _ = audited(plan, 30.0)
    assert not any(run.tried for run in report.runs)
    a_try = GRADIENTS * registry.load_attack("deceptive").fewest * 0.6 / 3
    expected = report.facts["examined_seconds"] + LEFT * a_try
    assert report.facts["enough"]["B"]["seconds"] == pytest.approx(expected)
    assert "would try deceptive" in report.undecided()[0]


class Silence:
    """A child that never answers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.killed = folder, False
        self.inbox = self

    def send(self, message: Mapping[str, Any]) -> None: ...

    def get(self, *, timeout: float) -> None:
        MACHINE.work(timeout)
        raise queue.Empty

    def kill(self) -> None:
        self.killed = True


@pytest.mark.own_process
@pytest.mark.parametrize("budget", [30.0, 600.0])
def test_a_process_that_hangs(
    plan: Plan, budget: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children: list[Silence] = []

    def hanging(self: Spawned) -> Any:
        if self._child is None:
            children.append(Silence(tmp_path))
            self._child = children[-1]  # type: ignore[assignment]
        return self._child

    monkeypatch.setattr(Spawned, "_alive", hanging)
    monkeypatch.setattr("leakatlas.audit.process._shared", lambda device: Spawned())
    report, spent = audited(replace(plan, in_process=False), budget)
    assert spent <= 1.1 * budget + 15
    assert children and all(child.killed for child in children)
    assert not any(run.tried for run in report.runs)
    told(report)


def test_an_interrupted_question_ends_the_process_that_was_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its answer would be taken for that to the next question."""
    child, spawned = Silence(tmp_path), Spawned()
    spawned._child = child  # type: ignore[assignment]

    def interrupted(*, timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spawned._answer(child, {}, Watch())  # type: ignore[arg-type]
    assert child.killed and spawned._child is None


def test_time_before_the_audit_counts(plan: Plan) -> None:
    """Start-up is a part of the budget of a command."""
    _, free = audited(plan, 60.0)
    report, spent = audited(plan, 60.0, begun=-25.0)
    assert report.seconds == pytest.approx(25 + spent)
    assert spent <= 60 - 25 < free
    assert not report.undecided()


def test_the_alarm_is_real(cache: Any) -> None:
    """A block that would go on for ever ends; who was to hear of alarms before hears of them."""
    before = signal.getsignal(signal.SIGALRM)
    with Deadline(time.perf_counter() - LATE - 10.0, 10.0).ends():
        for _ in itertools.count():
            pass
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_somebodys_own_alarm_still_rings() -> None:
    """As those of test runners do: ours comes before it, or not at all."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1_000.0)
        with Deadline(time.perf_counter(), 10.0).ends():
            assert signal.getitimer(signal.ITIMER_REAL)[0] < 20
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1_000
        with Deadline(time.perf_counter(), 5_000.0).ends():
            assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1_000
            signal.raise_signal(signal.SIGALRM)
        assert heard == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_have_no_alarm() -> None:
    seen: list[bool] = []

    def audit() -> None:
        with Deadline(0.0, 1.0).ends():
            seen.append(True)

    thread = threading.Thread(target=audit)
    thread.start()
    thread.join()
    assert seen == [True]


def test_a_process_that_is_still_starting_makes_no_attack_seem_dear() -> None:
    """The first run waits for it, and its first iteration loads what the later ones need."""
    MACHINE.now, MACHINE.load = 0.0, lambda now: 1.0
    cold = [8.0, 3.0]

    def run(attack: Attack, view: Any, seed: int, watch: Watch) -> Reconstruction:
        waits, loads = (cold.pop(0), cold.pop(0)) if cold else (0.1, 0.0)
        MACHINE.work(waits + loads + 0.02 * (attack.length or 1))
        images = torch.zeros(1, 1, 1, 1)
        return Reconstruction(images=images, seconds=loads + 0.02 * (attack.length or 1))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.perf_counter", lambda: MACHINE.now)
        view = SimpleNamespace(forget_reads=lambda: None)
        found = pace(Deceptive(), view, watch=Watch(20.0), run=run)  # type: ignore[arg-type]
    assert found is not None
    assert found.iteration == pytest.approx(0.02)
    assert found.overhead == pytest.approx(0.1)
