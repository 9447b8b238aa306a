"""Budgets that plan: iterations that fit, shares by what was rehearsed, equal duels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leakatlas import data, models
from leakatlas.attacks.api import Outlook
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit import Plan, Report, Run, carry_out, effort, iterating
from leakatlas.audit.budget import COMPARISONS, REPORT, Budget, Writer
from leakatlas.audit.compare import _alone
from leakatlas.audit.effort import spend
from leakatlas.audit.iterating import ambassadors, key_of
from leakatlas.audit.jobs import Job, not_run, would_not_fit
from leakatlas.audit.listener import Silent
from leakatlas.audit.ready import Readied, Timed, readied, timed
from leakatlas.audit.rehearsal import Rehearsal
from leakatlas.audit.run import enough
from leakatlas.audit.schedule import Pace, Try, pace, reserved, shares
from leakatlas.audit.start import Start
from leakatlas.audit.utility import Utility
from leakatlas.blocks.watch import FILL, Watch
from leakatlas.catalogue import registry
from leakatlas.fl import Federation
from leakatlas.threat import Vantage
from tests.conftest import build_stage


def _rehearsal(psnr: float, null: float = 10.0) -> Rehearsal:
    parameters = InvertingGradients.tuned().to_json()
    return Rehearsal("inverting_gradients", "tuned", parameters, psnr, null, 5, 5, 1e-3, "s", (),
                     0.0)  # fmt: skip


def test_a_stretched_schedule_keeps_the_proportions_of_its_parts() -> None:
    attack = GIAS(latent_steps=100, generator_steps=300)
    assert attack.length == 400
    longer = attack.lasting(1_000)
    assert (longer.latent_steps, longer.generator_steps) == (250, 750)
    assert GIAS(latent_steps=100, generator_steps=0).lasting(50).generator_steps == 0
    assert registry.attack("april").lasting(7).length == 7
    closed = registry.attack("robbing_the_fed")
    assert closed.length is None and closed.lasting(7) == closed


def test_a_pace_is_the_time_of_an_iteration() -> None:
    stage = build_stage(letter="B")
    view = stage.view([stage.federation.play_round()])
    at = pace(InvertingGradients.tuned(), view, watch=Watch())
    assert at is not None and at.iteration > 0 and at.overhead >= 0
    assert pace(registry.attack("robbing_the_fed"), view, watch=Watch()) is None
    assert view.reads == frozenset()


def test_a_plan_leaves_room_for_a_slower_machine() -> None:
    assert Pace(0.0, 1.0).fits(100.0) == 100 * FILL
    assert Pace(5.0, 1.0).fits(100.0) == 100 * FILL - 5
    assert Pace(5.0, 1.0).fits(5.0) == 0
    assert Pace(5.0, 1.0).slower(2.0).fits(100.0) == (100 * FILL - 10) // 2


def test_what_rebuilt_nothing_keeps_a_small_share() -> None:
    best, half, none = shares([12.0, 6.0, -3.0])
    assert best == pytest.approx(2 * half) and 0 < none < 0.1 * best
    assert shares([-1.0, -2.0]) == [0.5, 0.5]


@pytest.fixture
def three_targets(small_plan: Plan) -> Plan:
    """The iterating attack alone, on three clients, and a second one beside it."""
    (setting,) = small_plan.settings
    victims = data.photos(32).subset(range(3))
    attacks = ("inverting_gradients", "dlg")
    setting = replace(setting, victims=victims, clients=3, targets=(0, 1, 2), attacks=attacks)
    return replace(small_plan, settings=(setting,), letters=("B",), attack_parameters={})


def _short(plan: Plan) -> Plan:
    """Few iterations, more time than they need on any machine."""
    steps = {"inverting_gradients": {"steps": 12}, "dlg": {"steps": 2, "inner": 3}}
    return replace(plan, attack_parameters=steps, seconds=600.0)


def _jobs(plan: Plan) -> list[Job]:
    (setting,) = plan.settings
    return [
        Job(setting, registry.load_attack(key).tuned(), "B", target)
        for key in ("dlg", "inverting_gradients")
        for target in setting.targets
    ]


PACE = Pace(0.0, 1e-3)


def _timed(job: Job, plan: Plan, *, stop: Watch, pace: Pace = PACE) -> Timed:
    """As timed on a machine that takes a millisecond for an iteration."""
    return Timed(job.attack, None, None, pace, "", None)


def _spent(
    plan: Plan, gains: dict[str, float], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> list[tuple[Job, float]]:
    """The jobs in the order in which they were run, with what each was allowed."""
    made: list[tuple[Job, float]] = []

    def ready(at: Timed, job: Job, plan: Plan, **rest: Any) -> Readied:
        return Readied(job.attack, PACE, _rehearsal(10.0 + gains[job.attack.key]))

    def run(job: Job, plan: Plan, allowance: float, *rest: Any) -> Any:
        made.append((job, allowance))
        return not_run(job.setting, job.attack, Start("B", Outlook("unknown", ""), "refused"))

    monkeypatch.setattr(iterating, "timed", _timed)
    monkeypatch.setattr(iterating, "readied", ready)
    for room in (effort, iterating):
        monkeypatch.setattr(room, "run_job", run)
    list(spend(_jobs(plan), plan, Watch(seconds), None, Silent(), Watch()))
    return made


def test_the_budget_goes_to_what_rehearsed_best(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {"dlg": -2.0, "inverting_gradients": 8.0}
    made = _spent(three_targets, gains, monkeypatch, 600.0)
    keys = [job.attack.key for job, _ in made]
    assert keys == ["inverting_gradients"] * 3 + ["dlg"] * 3
    lengths = [job.attack.length for job, _ in made]
    assert lengths[0] is not None and lengths[0] > 1_000
    assert all(job.preset is not None and job.rehearsal["psnr"] for job, _ in made)
    other = _spent(three_targets, {key: -gain for key, gain in gains.items()}, monkeypatch, 600.0)
    assert [job.attack.key for job, _ in other] == ["dlg"] * 3 + ["inverting_gradients"] * 3


def test_an_iterating_attack_names_the_iterations_that_it_makes(three_targets: Plan) -> None:
    report = carry_out(_short(three_targets))
    assert len(report.runs) == 6
    for run in report.runs:
        assert run.tried, run.reason
        assert run.recipe["rehearsal"]["planned"] >= run.recipe["rehearsal"]["iterations"]
        if run.attack == "inverting_gradients":
            assert run.notes["iterations"] == run.recipe["attack"]["parameters"]["steps"]
    variants = {
        run.recipe["rehearsal"]["variant"]
        for run in report.runs
        if run.attack == "inverting_gradients"
    }
    assert len(variants) == 1


def test_without_a_rehearsal_the_preset_is_planned(three_targets: Plan) -> None:
    plan = replace(_short(three_targets), rehearsal=False)
    (run, *_) = [r for r in carry_out(plan).runs if r.attack == "inverting_gradients"]
    assert run.recipe["rehearsal"] == {}
    own = InvertingGradients.tuned().to_json()
    assert {**run.recipe["attack"]["parameters"], "steps": own["steps"]} == own


def test_a_length_that_the_user_set_is_kept(small_plan: Plan) -> None:
    report = carry_out(replace(small_plan, letters=("B",)))
    (run,) = [run for run in report.runs if run.attack == "inverting_gradients"]
    assert run.recipe["attack"]["parameters"]["steps"] == 5


def test_whose_turn_does_not_come_is_said_and_leaves_the_audit_undecided(
    three_targets: Plan,
) -> None:
    jobs = _jobs(three_targets)
    runs = list(spend(jobs, three_targets, Watch(0.0), None, Silent(), Watch()))
    assert len(runs) == len(jobs)
    assert all(run.status == "refused" and "budget" in run.reason for run in runs)
    assert all("more time" in run.wants and not run.tried for run in runs)


def test_rehearsals_leave_time_for_the_runs(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow they are: what they would overrun is not begun, and every attack is tried."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    asked: list[str] = []

    def slow(at: Timed, job: Job, plan: Plan, *, seconds: float, **rest: Any) -> Readied:
        if seconds <= 0:
            return Readied(job.attack, PACE, None, "no time")
        asked.append(job.attack.key)
        now[0] += 50.0
        return Readied(job.attack, PACE, _rehearsal(18.0))

    made: list[Job] = []

    def run(job: Job, *rest: Any) -> Run:
        made.append(job)
        return not_run(job.setting, job.attack, Start("B", Outlook("unknown", ""), "refused"))

    monkeypatch.setattr(iterating, "timed", _timed)
    monkeypatch.setattr(iterating, "readied", slow)
    for room in (effort, iterating):
        monkeypatch.setattr(room, "run_job", run)
    list(spend(_jobs(three_targets), three_targets, Watch(100.0), None, Silent(), Watch()))
    assert asked == ["inverting_gradients"]  # 40 s were for rehearsals; it has most to choose from
    assert {job.attack.key for job in made} == {"inverting_gradients", "dlg"} and len(made) == 6
    untried = next(job for job in made if job.attack.key == "dlg")
    assert "no time" in untried.rehearsal["refused"]


def _try(attack: str, least: float, *, leads: bool = False) -> Try:
    return Try(("s", attack), least, 2 * least, leads)


def test_the_leads_have_decent_runs_before_others_have_bare_tries() -> None:
    tries = [_try("cheap", 1.0), _try("lead", 10.0, leads=True), _try("dear", 30.0)]
    assert reserved(tries, 100.0) == {("s", "lead"): 20.0, ("s", "cheap"): 1.0, ("s", "dear"): 30.0}
    assert reserved(tries, 50.0) == {("s", "lead"): 20.0, ("s", "cheap"): 1.0}
    assert reserved(tries, 15.0) == {("s", "lead"): 15.0}  # fewer iterations rather than none
    assert reserved(tries, 5.0) == {("s", "cheap"): 1.0}
    assert reserved(tries, 0.0) == {}


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.booleans()), min_size=1, max_size=8),
    st.floats(0, 200),
)
def test_no_more_is_promised_than_there_is(costs: list[tuple[float, bool]], seconds: float) -> None:
    tries = [_try(str(n), least, leads=leads) for n, (least, leads) in enumerate(costs)]
    sure = reserved(tries, seconds)
    assert sum(sure.get(one.key, 0.0) for one in tries) <= seconds + 1e-6
    for one in tries:
        if one.key in sure:
            assert one.least - 1e-6 <= sure[one.key] <= one.decent + 1e-6


def test_what_does_not_fit_is_not_begun_and_said(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 iterations of a second each cannot go into 20 seconds that leave room."""

    def slow(job: Job, plan: Plan, *, stop: Watch) -> Timed:
        dear = job.attack.key == "inverting_gradients"
        return _timed(job, plan, stop=stop, pace=Pace(0.0, 1.0) if dear else PACE)

    def never(*rest: Any, **more: Any) -> Readied:
        raise AssertionError("a rehearsal of what does not fit")

    made: list[Job] = []

    def run(job: Job, *rest: Any) -> Run:
        made.append(job)
        return not_run(job.setting, job.attack, Start("B", Outlook("unknown", ""), "refused"))

    monkeypatch.setattr(iterating, "timed", slow)
    monkeypatch.setattr(
        iterating, "readied", lambda at, job, *a, **k: Readied(job.attack, at.pace, None, "-")
        if job.attack.key == "dlg" else never()
    )  # fmt: skip
    for room in (effort, iterating):
        monkeypatch.setattr(room, "run_job", run)
    runs = list(spend(_jobs(three_targets), three_targets, Watch(20.0), None, Silent(), Watch()))
    left_out = [r for r in runs if "would not fit" in r.reason]
    assert {r.attack for r in left_out} == {"inverting_gradients"} and len(left_out) == 3
    assert all(r.status == "refused" and "--budget" in r.wants for r in left_out)
    assert "20 iterations take about 23.5 s" in left_out[0].reason
    assert {job.attack.key for job in made} == {"dlg"} and len(made) == 3


def test_every_attack_is_sure_of_a_try_whatever_rehearsed_better(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = {"dlg": -20.0, "inverting_gradients": 20.0}
    made = _spent(three_targets, gains, monkeypatch, 30.0)
    assert len(made) == 6
    for job, _ in made:
        assert (job.attack.length or 0) >= job.attack.fewest


def test_an_attack_that_cannot_be_rehearsed_runs_and_says_why(three_targets: Plan) -> None:
    (job, *_) = [job for job in _jobs(three_targets) if job.attack.key == "inverting_gradients"]
    paced = timed(job, three_targets, stop=Watch())
    at = readied(paced, job, three_targets, seconds=0.0, allowance=5.0, stop=Watch())
    assert at.rehearsal is None and "no time for a rehearsal" in at.told()["refused"]
    assert at.lasting(1.0).length is not None


def test_every_set_of_defenses_meets_the_same_attacker(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakatlas.audit.compare.price_of", lambda *_, **__: Utility(0.9))
    defenses = {
        "clipping": (registry.defense("clipping", max_norm=0.01),),
        "pruning": (registry.defense("gradient_pruning", rate=0.5),),
    }
    plan = replace(_short(three_targets), alternatives=defenses, letters=("B", "C"))
    report = carry_out(plan)
    assert [c.name for c in report.comparisons] == ["as configured", "clipping", "pruning"]
    attackers = [
        [
            (run.attack, run.letter, run.recipe["seed"],
             run.recipe["attack"]["parameters"]["steps"])
            for run in comparison.runs
        ]
        for comparison in report.comparisons
    ]  # fmt: skip
    assert attackers[0] and attackers.count(attackers[0]) == 3


def test_diagnosis_counts_as_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 140.0)
    begun = 100.0
    budget = Budget(begun, 100.0, compares=True)
    left = budget.attacks(Watch()).remaining()
    assert left is not None and left == pytest.approx(27.0, abs=5.0)
    late = Budget(begun, 30.0, compares=False).attacks(Watch()).remaining()
    assert late is not None and late <= 0
    assert Budget(begun, None, compares=False).attacks(Watch()).remaining() is None


def test_what_the_diagnosis_left_is_divided(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it took, attacks and comparisons still have their parts."""
    monkeypatch.setattr("time.perf_counter", lambda: 190.0)
    defenses = {"clipping": (registry.defense("clipping"),)}
    slow = Budget.of(replace(small_plan, seconds=100.0, alternatives=defenses), 100.0)
    assert slow.attacks(Watch()).remaining() == pytest.approx((1 - COMPARISONS - REPORT) * 10.0)
    assert slow.comparisons(Watch()).remaining() == pytest.approx((1 - REPORT) * 10.0)
    late = Budget.of(replace(small_plan, seconds=50.0), 100.0)
    assert late.attacks(Watch()).remaining() == 0.0


def test_a_killed_audit_leaves_a_report(
    three_targets: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    class Killing(Silent):
        def __init__(self) -> None:
            self.left = 2

        def done(self, run: Any) -> None:
            self.left -= 1
            if not self.left:
                raise Killed

    with pytest.raises(Killed):
        carry_out(_short(three_targets), out=tmp_path, listener=Killing())
    assert (tmp_path / "report.html").is_file()


def test_reports_on_the_way_take_little_of_the_time(tmp_path: Path) -> None:
    saved: list[int] = []

    class Slow:
        def save(self, folder: Path) -> None:
            saved.append(1)

    def make() -> Report:
        return Slow()  # type: ignore[return-value]  # only saved

    clock: Iterator[float] = iter([0.0, 0.0, 1.0, 2.0, 10.9, 11.5, 11.5, 11.6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leakatlas.audit.budget.time.perf_counter", lambda: next(clock))
        writer = Writer(tmp_path)
        for _ in range(4):
            writer.now_and_then(make)
    assert len(saved) == 2


def test_a_defense_that_no_other_client_touches_is_compared_on_the_target_alone(
    three_targets: Plan,
) -> None:
    (setting,) = three_targets.settings
    setting = replace(setting, targets=(1, 2))
    alone = _alone(setting, (registry.defense("clipping"),))
    assert (alone.clients, alone.targets) == (1, (0,))
    assert torch.equal(alone.victims.images, setting.victims.images[1:2])
    together = _alone(setting, (registry.defense("secure_aggregation"),))
    assert (together.clients, together.targets) == (3, (1,))
    summed = replace(setting, vantage=Vantage.AGGREGATE)
    assert _alone(summed, ()).clients == 3


def test_the_work_of_a_defense_is_known_before_its_round() -> None:
    """Soteria differentiates every feature of a layer; the others cost about one gradient."""
    model = models.build("fc", in_channels=3, size=8, classes=4, widths=[32])
    assert registry.defense("soteria").workload(model) == 17.0
    assert registry.defense("soteria", prune=0.0).workload(model) == 1.0
    assert registry.defense("clipping").workload(model) == 1.0


def test_honest_clients_compute_once_for_all_passive_attacks(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[int] = []
    play = Federation.play_round

    def counted(self: Federation, **rest: Any) -> Any:
        played.append(1)
        return play(self, **rest)

    monkeypatch.setattr(Federation, "play_round", counted)
    report = carry_out(_short(three_targets))
    assert len(report.runs) == 6 and all(run.tried for run in report.runs)
    assert len(played) == 2  # the doctor's round, and the one that every attack is shown


def test_rounds_under_masks_wait_for_what_the_others_leave(
    three_targets: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can end one half-way, and it may take any time: attacks that iterate come before."""
    (setting,) = three_targets.settings
    masked = replace(
        setting, name="masked", defenses=(registry.defense("secure_aggregation"),), targets=(0,)
    )
    closed = registry.load_attack("robbing_the_fed").tuned()
    jobs = [Job(masked, closed, "G", 0), Job(setting, closed, "G", 0)]
    jobs += _jobs(three_targets)[-1:]
    made: list[tuple[str, str]] = []

    def run(job: Job, *rest: Any) -> Run:
        made.append((job.setting.name, job.attack.key))
        return not_run(job.setting, job.attack, Start("B", Outlook("unknown", ""), "refused"))

    monkeypatch.setattr(iterating, "timed", _timed)
    monkeypatch.setattr(
        iterating, "readied", lambda at, job, *a, **k: Readied(job.attack, at.pace, None, "-")
    )
    for room in (effort, iterating):
        monkeypatch.setattr(room, "run_job", run)
    list(spend(jobs, three_targets, Watch(600.0), None, Silent(), Watch()))
    keys = [("one photo", "robbing_the_fed"), ("one photo", "inverting_gradients")]
    assert made == [*keys, ("masked", "robbing_the_fed")]


def test_what_every_letter_needs_is_timed_first(small_plan: Plan) -> None:
    """What B can do, so can C and D: of them none needs an attack of its own; A does."""
    (setting,) = small_plan.settings

    def job(key: str, letter: str) -> Job:
        return Job(setting, registry.load_attack(key).tuned(), letter, 0)

    jobs = [job("inverting_gradients", "B"), job("gias", "D"), job("dlg", "A"), job("idlg", "A")]
    keys = [key_of(job) for job in jobs]
    chosen = ambassadors(keys, dict(zip(keys, jobs, strict=True)), "ABCD")
    assert {key for _, key in chosen} == {"inverting_gradients", "dlg"}
    assert {key for _, key in ambassadors(keys[1:2], {keys[1]: jobs[1]}, "ABCD")} == {"gias"}


def test_a_letter_without_a_try_hears_which_budget_would_make_one(small_plan: Plan) -> None:
    """The cheapest attack that counts for it, three times, on top of what examining took."""
    (setting,) = small_plan.settings
    plan = replace(small_plan, letters=("A", "B"), seconds=30.0)

    def left_out(key: str, letter: str, seconds: float) -> Run:
        job = Job(setting, registry.load_attack(key).tuned(), letter, 0)
        return would_not_fit(job, seconds, 1.0)

    runs = [left_out("inverting_gradients", "B", 80.0), left_out("gias", "B", 50.0)]
    found = enough(plan, runs, 12.0)
    assert found == {"B": {"attack": "gias", "seconds": 162.0}}
    short = enough(plan, [left_out("gias", "B", 2.0)], 12.0)
    assert short["B"]["seconds"] == 36.0, "more than the budget that did not do"

    def said(letters: tuple[str, ...], **facts: object) -> str:
        report = Report(tuple(runs), (), letters, {}, {"budget_seconds": 30.0, **facts}, "", {},
                        complete=True, seconds=30.0)  # fmt: skip
        return report.undecided()[0]

    words = said(("B",), enough=found)
    assert words == "nothing was tried for letter B (a budget of about 3 min would try gias)"
    alone = (
        "nothing was tried for letters A, B (of 30 s, start-up and examination alone took 28; a "
        "budget of about 1.5 min leaves time for attacks)"
    )
    assert said(("A", "B"), enough=found, examined_seconds=28.0) == alone
    assert said(("A", "B"), enough=found, examined_seconds=12.0) == alone.partition(" (")[0]
