"""Carrying out an audit: who can do what, one attack after the other, within a budget."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import leakatlas
from leakatlas import devices
from leakatlas.attacks.api import Outlook
from leakatlas.audit import kept, process
from leakatlas.audit.bounds import require_feasible
from leakatlas.audit.budget import Budget, Writer, other_side
from leakatlas.audit.compare import compare
from leakatlas.audit.deadline import Deadline
from leakatlas.audit.diagnosis import examine
from leakatlas.audit.effort import once_more, spend
from leakatlas.audit.formal import guarantees
from leakatlas.audit.iterating import stands_for
from leakatlas.audit.jobs import TRY, Job, not_run, unreached
from leakatlas.audit.listener import Listener, Silent
from leakatlas.audit.plan import Plan, Setting, presets
from leakatlas.audit.ready import guessed, iterates
from leakatlas.audit.realism import NOT_YET, Pair, other_sides, pair_of, realism_of
from leakatlas.audit.start import Start
from leakatlas.blocks.watch import MORE_TIME, Watch
from leakatlas.catalogue import registry
from leakatlas.fl import Defense, model_state, state_hash
from leakatlas.fl.capture import facts_of
from leakatlas.fl.view import defense_json
from leakatlas.report import Comparison, Realism, Report, Run, check_writable
from leakatlas.threat import Vantage

EXAMINED = 0.7
"""Share of the budget, start-up included, after which set-ups are examined no further than must be:
measures are left out, attacks are not asked, and both is said."""


def carry_out(
    plan: Plan,
    *,
    out: Path | None = None,
    listener: Listener | None = None,
    stop: Watch | None = None,
    begun: float | None = None,
) -> Report:
    """Run an audit.

    With ``out``, every finished run is kept there at once and the report is written as runs end;
    the same audit started again reads them instead of running them, so a killed audit resumes.

    Args:
        plan: What to do.
        out: Folder for results; nothing is kept if None.
        listener: Told about progress.
        stop: Its :meth:`~leakatlas.blocks.watch.Watch.stop` ends the audit early; what was
            computed is reported.
        begun: From when on the budget counts, by ``time.perf_counter``; from now if None.

    Raises:
        InvalidInput: If ``out`` cannot be written, another audit is writing there, or a setting
            does not fit its model.
        UnknownName: If an attack does not exist.
    """
    begun = time.perf_counter() if begun is None else begun
    told, halt = listener or Silent(), stop or Watch()
    if out is None:
        return _carry_out(plan, None, told, halt, begun)
    check_writable(out)
    with kept.alone(out):
        return _carry_out(plan, out, told, halt, begun)


def _carry_out(
    plan: Plan, out: Path | None, listener: Listener, stop: Watch, begun: float
) -> Report:
    deadline = Deadline(begun, plan.seconds)
    process.adversary(plan)  # it starts while the set-ups are being examined
    jobs: list[Job] = []
    runs: list[Run] = []
    diagnoses: dict[str, Mapping[str, Any]] = {}
    with deadline.ends():
        for position, setting in enumerate(plan.settings):
            left = None if plan.seconds is None else EXAMINED * plan.seconds - deadline.spent
            part = None if left is None else max(left, 0.0) / (len(plan.settings) - position)
            _examine(setting, plan, jobs, runs, diagnoses, watch=Watch(part))
    for setting in plan.settings:
        if setting.name not in diagnoses:
            runs += _unexamined(setting, plan)
    examined = deadline.spent
    listener.begin(len(jobs))
    pairs = [pair_of(setting, wanted=plan.upper_bound) for setting in plan.settings]
    budget = Budget.of(plan, begun, other_side=_share_of_other_sides(jobs, pairs))
    written = Writer(out)

    def report(
        comparisons: Sequence[Comparison], realism: tuple[Realism, ...], *, complete: bool
    ) -> Report:
        return Report(
            runs=tuple(runs),
            comparisons=tuple(comparisons),
            letters=plan.letters,
            diagnoses=diagnoses,
            facts={
                **_facts(plan),
                "examined_seconds": examined,
                "enough": enough(plan, runs, examined),
            },
            command=plan.command,
            source=plan.source,
            complete=complete,
            seconds=time.perf_counter() - begun,
            realism=realism,
            context=plan.context,
        )

    unmade = tuple(realism_of(pair, silent=NOT_YET) for pair in pairs)
    barred = tuple(runs)
    with deadline.ends():
        for run in spend(jobs, plan, budget.attacks(stop), out, listener, stop):
            runs.append(run)
            listener.done(run)
            written.now_and_then(lambda: report((), unmade, complete=False))
    if not stop.stopped:
        ended = {_place(run) for run in runs}
        runs += [
            unreached(job, seconds=guessed(job, plan.seed)) for job in jobs if _of(job) not in ended
        ]
    realism = other_sides(
        pairs, plan, runs, barred, budget.other_sides(stop), out, listener, stop, deadline
    )
    comparisons = compare(
        plan, runs, budget.comparisons(stop), out, listener, stop, deadline=deadline
    )
    made = [(job, run) for job in jobs for run in runs if _of(job) == _place(run)]
    with deadline.ends():
        for run in once_more(made, plan, budget.rest(stop), out, listener, stop):
            runs[:] = [run if _place(run) == _place(old) else old for old in runs]
            listener.done(run)
    whole = report(comparisons, realism, complete=not stop.stopped)
    return written.finally_(whole)


LEFT = 3.0
"""A budget that holds so many times a bare try of an attack, beyond the examination, tries it: the
attacks are not all that a budget is for."""


def enough(plan: Plan, runs: Sequence[Run], examined: float) -> dict[str, Any]:
    """Per letter for which nothing was tried: an attack, and seconds of a budget that tries it.

    Args:
        plan: The letters.
        runs: All of them; those that were not begun note what they are expected to take.
        examined: Seconds until the first attack.
    """
    found: dict[str, Any] = {}
    for letter in plan.letters:
        able = [run for run in runs if run.letter and stands_for(run.letter, letter)]
        priced = [run for run in able if TRY in run.notes]
        if priced and not any(run.tried for run in able):
            first = min(priced, key=lambda run: run.notes[TRY])
            seconds = examined + LEFT * first.notes[TRY]
            if plan.seconds is not None and seconds <= plan.seconds:
                seconds += plan.seconds - examined  # others took all of it, and would again
            found[letter] = {"attack": first.attack, "seconds": seconds}
    return found


def _examine(
    setting: Setting,
    plan: Plan,
    jobs: list[Job],
    runs: list[Run],
    diagnoses: dict[str, Mapping[str, Any]],
    *,
    watch: Watch,
) -> None:
    """Diagnose a set-up: what is to be run there, and what cannot."""
    attacks = presets(setting.attacks, plan.attack_parameters, published=plan.seconds is None)
    live = setting.readable().stage(letter=plan.letters[0], seed=plan.seed)
    require_feasible(live, attacks, plan.seconds)
    diagnosis = examine(live, attacks, letters=plan.letters, watch=watch)
    diagnoses[setting.name] = diagnosis.to_json()
    setting.expect(plan.seed, diagnosis.round_seconds)
    for attack in attacks:
        start = diagnosis.outlooks[attack.key]
        if start.obstacle is not None:
            runs.append(not_run(setting, attack, start))
            continue
        # A pooled reconstruction covers every client at once.
        targets = setting.targets[:1] if _pooled(setting) else setting.targets
        jobs.extend(Job(setting, attack, start.letter, target) for target in targets)


def _unexamined(setting: Setting, plan: Plan) -> list[Run]:
    """The entries of attacks on a set-up that the budget did not reach."""
    why = Outlook("unknown", "the budget ended before the set-up was examined")
    start = Start("", why, "refused", MORE_TIME)
    attacks = presets(setting.attacks, plan.attack_parameters, published=plan.seconds is None)
    return [not_run(setting, attack, start) for attack in attacks]


def _share_of_other_sides(jobs: Sequence[Job], pairs: Sequence[Pair]) -> float:
    twofold = [pair.setting.name for pair in pairs if pair.other is not None]
    among = sum(iterates(job.attack) for job in jobs)
    return other_side(among, len(twofold)) if twofold else 0.0


def _of(job: Job) -> tuple[str, str, int]:
    return job.setting.name, job.attack.key, job.target


def _place(run: Run) -> tuple[str, str, int]:
    return run.setting, run.attack, run.target


def _pooled(setting: Setting) -> bool:
    """Whether the adversary sees a sum over all clients, so that one attack is after all."""
    return setting.effective_vantage is Vantage.AGGREGATE


def _facts(plan: Plan) -> dict[str, Any]:
    first = plan.settings[0]

    def formal(setting: Setting, defenses: Sequence[Defense]) -> list[dict[str, Any]]:
        context = plan.context
        return guarantees(defenses, setting.protocol, rounds=context.rounds, delta=context.delta)

    return {
        "date": datetime.now(UTC).date().isoformat(),
        "leakatlas": leakatlas.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "device": devices.in_words(first.device),
        "budget_seconds": plan.seconds,
        "seed": plan.seed,
        "model": type(first.model).__name__,
        "catalogue": len(registry.attack_keys()),
        "guarantees": {
            "settings": {s.name: formal(s, s.defenses) for s in plan.settings},
            "comparisons": {
                "as configured": formal(first, first.defenses),
                **{name: formal(first, some) for name, some in plan.alternatives.items()},
            },
        },
        "settings": [
            {
                "name": setting.name,
                "images": len(setting.victims),
                "shape": list(setting.victims.images.shape[1:]),
                "clients": setting.clients,
                "model_hash": state_hash(model_state(setting.model)),
                "attacked": setting.clients if _pooled(setting) else len(set(setting.targets)),
                "protocol": type(setting.protocol).__name__,
                "parameters": setting.protocol.to_json(),
                "loss": setting.protocol.loss.describe(),
                "defenses": [defense_json(d) for d in setting.defenses],
                "vantage": setting.effective_vantage.value,
                "population": setting.public.name,
                "strangers": setting.surrogate is None,
                "grants": sorted(grant.value for grant in setting.grants),
                "captured": None if setting.captured is None else facts_of(setting.captured),
            }
            for setting in plan.settings
        ],
    }
