"""One attack on one client of one setting: run, scored, and kept."""

from __future__ import annotations

import re
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from leakatlas.attacks.api import ActiveAttack, Attack, Outlook, cache_folder
from leakatlas.audit import control, kept, process
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting
from leakatlas.audit.start import Start
from leakatlas.bench import harness
from leakatlas.blocks.watch import MORE_TIME, Conduct, Watch
from leakatlas.errors import (
    InvalidInput,
    InvalidParameter,
    NotGranted,
    Unavailable,
    UnsupportedModel,
)
from leakatlas.fl import RoundRecord, Stage
from leakatlas.fl.sharing import frozen_names, unshared_names
from leakatlas.metrics.score import Scores, score
from leakatlas.report import Run, pictures_of, verdict


def shown(job: Job, plan: Plan) -> tuple[Stage, tuple[RoundRecord, ...]]:
    """What a job's adversary sees of the honest clients, and the stage behind it."""
    return job.setting.shown_to(job.letter, plan.seed)


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Args:
        setting: The set-up.
        attack: With its parameters.
        letter: Threat model it runs under.
        target: Client attacked.
        preset: What the attack was before a rehearsal and a plan changed its parameters, if they
            did: the name under which its run is kept.
        rehearsal: How the parameters were chosen, for recipe and report.
        compared: Whether it is one of several of equal length that compare defenses.
    """

    setting: Setting
    attack: Attack
    letter: str
    target: int
    preset: Attack | None = None
    rehearsal: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False


def kept_as(job: Job, plan: Plan, out: Path | None) -> Path | None:
    """Where the run of a job is kept; None if nothing is."""
    if out is None:
        return None
    scenario = job.setting.scenario(letter=job.letter, seed=plan.seed)
    named = kept.recipe_of(job.setting, job.preset or job.attack, scenario.to_json(), plan)
    if job.compared:
        named = replace(named, conditions={**named.conditions, "compared": True})
    return out / "runs" / kept.identity(job.setting, job.target, named)


def finished(job: Job, plan: Plan, out: Path | None) -> Run | None:
    """The run of a job that was finished before, if it was kept."""
    if out is None or not (out / "runs").is_dir():
        return None
    place = kept_as(job, plan, out)
    return None if place is None else kept.load(place, plan.seconds)


def forget(job: Job, plan: Plan, out: Path | None) -> None:
    """Do not take the kept run of a job for its last word."""
    place = kept_as(job, plan, out)
    if place is not None:
        kept.forget(place)


def run_job(
    job: Job,
    plan: Plan,
    allowance: float | None,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Run:
    """Run one job, or read it from ``out`` if it was finished before.

    Args:
        job: What to run.
        plan: Seed and execution.
        allowance: Seconds; None for no limit.
        out: Folder that keeps finished runs and checkpoints; nothing is kept if None.
        listener: Told about progress.
        stop: Ends the run early.
    """
    vantage = job.setting.effective_vantage
    active = isinstance(job.attack, ActiveAttack)
    scenario = job.setting.scenario(letter=job.letter, seed=plan.seed)
    recipe = kept.recipe_of(job.setting, job.attack, scenario.to_json(), plan)
    recipe = replace(recipe, rehearsal=job.rehearsal)
    cache = kept_as(job, plan, out)
    if cache is not None and (before := kept.load(cache, plan.seconds)) is not None:
        return before
    name = f"{job.setting.name}: {job.attack.key}"
    # Not beside the finished runs: they hold the originals, and the attack knows this path.
    progress = None if cache is None else cache_folder() / "progress" / cache.name
    watch = Watch(
        None if allowance is None else control.part(job.attack) * allowance,
        lambda fraction, note: listener.run(name, fraction, note),
        parent=stop,
        conduct=Conduct(execution=plan.execution, checkpoints=progress),
    )
    listener.run(name, 0.0)
    blank = Run(
        setting=job.setting.name,
        attack=job.attack.key,
        letter=job.letter,
        vantage=vantage.value,
        target=job.target,
        defenses=tuple(d.key for d in job.setting.defenses),
        status="error",
        reason="",
        verdict="not tested",
        recipe=recipe.to_json(),
    )
    try:
        if active:
            live, played = job.setting.stage(letter=job.letter, seed=plan.seed), None
        else:
            live, played = shown(job, plan)
        run = _scored(job, blank, live, played, plan, watch)
    except (NotGranted, InvalidInput, InvalidParameter, Unavailable) as refusal:
        run = replace(blank, status="refused", reason=str(refusal), wants=str(refusal))
    except UnsupportedModel as refusal:
        run = replace(blank, status="not applicable", reason=str(refusal))
    # An attack is anybody's code, run on anybody's model: whatever it raises, a call of sys.exit
    # included, is the result of this run alone, and the others go on.
    except (Exception, SystemExit) as crash:
        reason = f"{type(crash).__name__}: {crash}"
        if missed := held_back(job.setting, reason):
            why = f"it reads the gradient of {missed!r}, which never leaves the client"
            run = replace(blank, status="not applicable", reason=why)
        else:
            run = replace(blank, status="error", reason=reason, trace=traceback.format_exc())
    if cache is not None and progress is not None and not stop.stopped:
        try:
            kept.save(cache, run, plan.seconds)
        except OSError as problem:  # the run itself is whole, and others may still be kept
            return replace(run, unkept=f"{cache.parent} cannot be written ({problem.strerror})")
        if run.status != "cut short":  # with more time it goes on from there
            shutil.rmtree(progress, ignore_errors=True)
    return run


def held_back(setting: Setting, crash: str) -> str:
    """What an attack looked up by name and did not find, if it is a parameter that stays home.

    An update holds what is shared and nothing else, so asking for more ends as it does in a
    mapping; in the attack's own process as well, whose last words are then all there is.

    Args:
        setting: Says what is shared.
        crash: Kind and words of what the attack raised.
    """
    found = re.search(r"KeyError: '([^']+)'", crash)
    if found is None:
        return ""
    home = unshared_names(setting.model, setting.protocol.shared) | frozen_names(setting.model)
    fits = (name for name in home if found[1] == name or found[1].endswith(f".{name}"))
    return max(fits, key=len, default="")


def _scored(
    job: Job,
    blank: Run,
    live: Stage,
    played: tuple[RoundRecord, ...] | None,
    plan: Plan,
    watch: Watch,
) -> Run:
    """Play, attack, and hold what came out against the truth."""
    trial = harness.run_trial(
        live,
        job.attack,
        target=job.target,
        seed=plan.seed,
        watch=watch,
        adversary=process.adversary(plan),
        played=played,
    )
    labels = trial.found.labels
    if labels is None and trial.found.label_counts is not None:
        labels = torch.repeat_interleave(
            torch.arange(len(trial.found.label_counts)), trial.found.label_counts.long()
        )
    own = trial.found.confidence
    tried = replace(
        blank,
        status=trial.found.status,
        reason=trial.found.reason,
        seconds=trial.found.seconds,
        rounds=len(trial.records),
        reads=tuple(sorted(trial.found.reads)),
        confidence=() if own is None else tuple(own.tolist()),
        notes=dict(trial.found.notes),
        execution=trial.found.execution,
    )
    if not live.known:
        shown = trial.images[:16].clamp(0, 1)[:, None] if len(trial.images) else None
        return replace(tried, verdict="not scored", pictures=shown)
    oracle = "labels" in trial.found.reads
    vectors = trial.truth.labels.dim() > 1  # targets of several entries are no labels to count

    def scored(baselines: Mapping[str, torch.Tensor]) -> Scores:
        return score(
            trial.images if len(trial.images) else None,
            trial.truth.images.to(trial.images.dtype),
            public=job.setting.public.images.to(trial.images.dtype),
            labels=None if vectors else trial.truth.labels,
            recovered_labels=None if oracle or vectors else labels,
            classes=live.classes,
            baselines=baselines,
        )

    scores = scored({})
    if control.wanted(job.attack, scores):
        try:
            other = control.other_batch(
                job.setting, live, job.attack, target=job.target, seed=plan.seed,
                watch=watch.again(), adversary=process.adversary(plan),
            )  # fmt: skip
        except Unavailable as problem:
            tried = replace(tried, reason=str(problem))
        else:
            if len(other):
                scores = scored({control.BASELINE: other.to(trial.images.dtype)})
            if verdict(scores) != "recognisable":
                tried = replace(tried, reason=control.PRIOR)
    return replace(
        tried,
        verdict=verdict(scores),
        scores=scores,
        pictures=pictures_of(scores, trial.images, trial.truth.images),
    )


def not_run(setting: Setting, attack: Attack, start: Start) -> Run:
    """The entry of an attack that did not start, with the reason."""
    assert start.obstacle is not None
    return Run(
        setting=setting.name,
        attack=attack.key,
        letter=start.letter,
        vantage=setting.effective_vantage.value,
        target=setting.targets[0],
        defenses=tuple(d.key for d in setting.defenses),
        status=start.obstacle,
        reason=start.outlook.reason,
        verdict="not tested",
        wants=start.wants,
        trace=start.trace,
    )


TRY = "seconds_of_a_try"
"""Note of a run that was not begun: what it is expected to take here."""


def unreached(
    job: Job,
    why: str = "the budget ended before it began",
    *,
    wants: str = MORE_TIME,
    seconds: float | None = None,
) -> Run:
    """The entry of a job whose turn did not come: its outcome is open, and ``wants`` would tell.

    Args:
        job: What was to be run.
        why: Its turn did not come.
        wants: What the user could do.
        seconds: Of a bare try here, if that is known.
    """
    blank = not_run(
        replace(job.setting, targets=(job.target,)),
        job.attack,
        Start(job.letter, Outlook("unknown", why), "refused", wants),
    )
    return blank if seconds is None else replace(blank, notes={TRY: seconds})


def would_not_fit(job: Job, least: float, left: float) -> Run:
    """The entry of a job that was not begun, because a try of it takes longer than there is."""
    why = (
        f"not tried: would not fit; {job.attack.fewest} iterations take about {least:.1f} s here, "
        f"and {max(left, 0.0):.1f} s of the budget are left for it"
    )
    return unreached(job, why, seconds=least)
