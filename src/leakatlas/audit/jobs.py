"""One attack on one client of one setting: run, scored, and kept."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.audit import kept
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting
from leakatlas.bench import harness
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import patches
from leakatlas.errors import LeakAtlasError
from leakatlas.metrics.score import score
from leakatlas.report import VERDICTS, Run, pictures_of, verdict


@dataclass(frozen=True)
class Job:
    """What is to be run.

    Args:
        setting: The set-up.
        attack: With its parameters.
        letter: Threat model it runs under.
        target: Client attacked.
        weight: Share of the budget, relative to the other jobs.
    """

    setting: Setting
    attack: Attack
    letter: str
    target: int
    weight: float


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
    live = job.setting.stage(letter=job.letter, seed=plan.seed)
    recipe = job.attack.recipe(plan.seed, live.scenario.to_json())
    cache = None
    if out is not None:
        cache = out / "runs" / kept.identity(job.setting, job.target, recipe.content_hash)
    if cache is not None and (finished := kept.load(cache)) is not None:
        return finished
    name = f"{job.setting.name}: {job.attack.key}"
    progress = None if cache is None else cache.with_name(f"{cache.name}.progress")
    watch = Watch(
        allowance,
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
        defenses=tuple(d.key for d in live.federation.defenses),
        status="refused",
        reason="",
        verdict=VERDICTS[0],
        recipe=recipe.to_json(),
    )
    try:
        trial = harness.run_trial(live, job.attack, target=job.target, seed=plan.seed, watch=watch)
    except LeakAtlasError as refusal:
        return replace(blank, reason=str(refusal))
    labels = trial.found.labels
    if labels is None and trial.found.label_counts is not None:
        labels = torch.repeat_interleave(
            torch.arange(len(trial.found.label_counts)), trial.found.label_counts.long()
        )
    oracle = "labels" in trial.found.reads
    scores = score(
        trial.images if len(trial.images) else None,
        trial.truth.images.to(trial.images.dtype),
        public=public_images(job.setting, trial.truth.images).to(trial.images.dtype),
        labels=trial.truth.labels,
        recovered_labels=None if oracle else labels,
        classes=live.classes,
    )
    run = replace(
        blank,
        status=trial.found.status,
        reason=trial.found.reason,
        verdict=verdict(scores),
        seconds=trial.found.seconds,
        rounds=len(trial.records),
        reads=tuple(sorted(trial.found.reads)),
        scores=scores,
        notes=dict(trial.found.notes),
        execution=trial.found.execution,
        pictures=pictures_of(scores, trial.images, trial.truth.images),
    )
    if cache is not None and progress is not None and not stop.stopped:
        kept.save(cache, run)
        shutil.rmtree(progress, ignore_errors=True)
    return run


def not_run(setting: Setting, attack: Attack, letter: str, reason: str) -> Run:
    """The entry of an attack that was not tried, with the reason."""
    return Run(
        setting=setting.name,
        attack=attack.key,
        letter=letter,
        vantage=setting.vantage.value,
        target=setting.targets[0],
        defenses=tuple(d.key for d in setting.defenses),
        status="not run",
        reason=reason,
        verdict=VERDICTS[0],
    )


def public_images(setting: Setting, like: Tensor) -> Tensor:
    """Public images in the victims' shape, for the null baselines."""
    if setting.surrogate is not None:
        return setting.surrogate.images
    channels, height, width = like.shape[1:]
    images = patches(max(height, width), 64, part="surrogate").images[:, :, :height, :width]
    if channels == 3:
        return images
    return images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
