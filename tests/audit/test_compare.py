"""Which attacks meet a defense, and what becomes of defenses that cannot take part."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from leakatlas.audit import Plan, carry_out
from leakatlas.audit.compare import _battery, _Duel
from leakatlas.audit.jobs import Job
from leakatlas.audit.listener import Silent
from leakatlas.audit.utility import Utility
from leakatlas.blocks.watch import Watch
from leakatlas.catalogue import registry
from leakatlas.errors import IncompatibleDefenses


def test_sets_that_cannot_stand_together_are_refused_before_anything_runs(small_plan: Plan) -> None:
    both = (
        registry.defense("secure_aggregation"),
        registry.defense("central_dp", noise_multiplier=1.0),
    )
    with pytest.raises(IncompatibleDefenses, match=r"alternatives, 'both': central_dp must read"):
        replace(small_plan, alternatives={"both": both})


def test_a_set_that_does_not_fit_the_model_says_so_and_the_others_go_on(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakatlas.audit.compare.price_of", lambda *_, **__: Utility(0.9))
    sets = {
        "locked": (registry.defense("fedkl"),),  # needs a normalisation layer
        "clipping": (registry.defense("clipping", max_norm=0.01),),
    }
    report = carry_out(replace(small_plan, alternatives=sets))
    locked, clipped = report.comparisons[1:]
    assert {run.status for run in locked.runs} == {"refused"}
    assert all("FedKL locks the scale and shift" in run.reason for run in locked.runs)
    assert any(run.scores is not None for run in clipped.runs)
    assert any("locked" in reason for reason in report.undecided())


def test_every_kind_of_attack_meets_a_defense(small_plan: Plan) -> None:
    """What ends a closed form may leave a search as it was."""
    setting = replace(
        small_plan.settings[0], attacks=("rgap", "inverting_gradients", "robbing_the_fed")
    )
    report = carry_out(replace(small_plan, settings=(setting,)))
    keys = [key for key, _ in _battery(report.runs)]
    assert keys == ["rgap", "robbing_the_fed", "inverting_gradients"]


class Hourglass(Watch):
    """A watch that only what is timed moves."""

    def __init__(self, seconds: float) -> None:
        super().__init__(None)
        self.left = seconds

    def remaining(self) -> float:
        return self.left

    @property
    def over(self) -> bool:
        return self.left <= 0


@pytest.mark.parametrize(("seconds", "tried"), [(10.0, "ab"), (100.0, "abcd"), (0.0, "")])
def test_a_short_budget_tries_the_first_sets_and_names_the_others(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch, seconds: float, tried: str
) -> None:
    """To time all of them would leave nothing to attack any of them with."""
    watch = Hourglass(seconds)
    duel = _Duel(small_plan, "inverting_gradients", "C", watch, None, Silent(), Watch())
    jobs = {name: duel.job(small_plan.settings[0]) for name in "abcd"}

    def timed(*_: Any, **__: Any) -> Any:
        watch.left -= 3.0
        return SimpleNamespace(least=0.1)

    def readied(at: Any, job: Job, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            attack=job.attack, rehearsal="made", pace=None, fixed=None, reason=""
        )

    monkeypatch.setattr("leakatlas.audit.compare.timed", timed)
    monkeypatch.setattr("leakatlas.audit.compare.readied", readied)
    monkeypatch.setattr("leakatlas.audit.compare.control.part", lambda attack: 1.0)
    monkeypatch.setattr("leakatlas.audit.compare.planned_for", lambda job, *_: job)
    monkeypatch.setattr("leakatlas.audit.compare.run_job", lambda *_: "ran")
    found: dict[str, Any] = dict(duel._planned(jobs, None))
    assert {name for name, run in found.items() if run == "ran"} == set(tried)
    others = [run for run in found.values() if run != "ran"]
    assert {run.status for run in others} <= {"refused"} and len(found) == 4
    assert all("the budget ended before it began" in run.reason for run in others)
