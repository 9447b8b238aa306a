"""Carrying out an audit: who can do what, one attack after the other, within a budget."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import leakatlas
from leakatlas.attacks.api import ActiveAttack, Attack
from leakatlas.audit import harness
from leakatlas.audit.diagnosis import examine
from leakatlas.audit.plan import (
    RECOGNISABLE_PSNR,
    VERDICTS,
    Plan,
    Setting,
    cost_weight,
    presets,
)
from leakatlas.audit.report_data import Comparison, Report, Run, check_writable, pictures_of
from leakatlas.audit.utility import accuracy_under
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import patches
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import FedSGD, model_state, state_hash
from leakatlas.fl.view import defense_json
from leakatlas.metrics.score import Scores, score
from leakatlas.threat import LETTERS

COMPARISON_SHARE = 0.35
"""Part of the budget that goes to comparing defenses, if any are compared."""


class Listener(Protocol):
    """What shows an audit's progress to people."""

    def begin(self, total: int) -> None:
        """The number of planned runs is known."""

    def run(self, name: str, fraction: float, note: str = "") -> None:
        """A run is this far; ``note`` says criterion, speed and time to come."""

    def done(self, run: Run) -> None:
        """A run has ended."""


class Silent:
    """A listener that shows nothing."""

    def begin(self, total: int) -> None:
        """Ignore."""

    def run(self, name: str, fraction: float, note: str = "") -> None:
        """Ignore."""

    def done(self, run: Run) -> None:
        """Ignore."""


@dataclass(frozen=True)
class _Job:
    setting: Setting
    attack: Attack
    letter: str
    target: int
    weight: float


def carry_out(
    plan: Plan,
    *,
    out: Path | None = None,
    listener: Listener | None = None,
    stop: Watch | None = None,
) -> Report:
    """Run an audit.

    With ``out``, every finished run is kept there at once; the same audit started again reads
    them instead of running them, so a killed audit resumes.

    Args:
        plan: What to do.
        out: Folder for results; nothing is kept if None.
        listener: Told about progress.
        stop: Its :meth:`~leakatlas.blocks.watch.Watch.stop` ends the audit early; what was
            computed is reported.

    Raises:
        InvalidInput: If ``out`` cannot be written, or a setting does not fit its model.
        UnknownName: If an attack does not exist.
    """
    if out is not None:
        check_writable(out)
    begun = time.perf_counter()
    listener = listener or Silent()
    stop = stop or Watch()
    published = plan.seconds is None
    jobs: list[_Job] = []
    runs: list[Run] = []
    diagnoses: dict[str, Mapping[str, Any]] = {}
    for setting in plan.settings:
        attacks = presets(setting.attacks, plan.attack_parameters, published=published)
        live = setting.stage(letter=plan.letters[0], seed=plan.seed)
        diagnosis = examine(live, attacks, letters=plan.letters)
        diagnoses[setting.name] = diagnosis.to_json()
        for attack in attacks:
            letter, outlook = diagnosis.outlooks[attack.key]
            if not letter or outlook.verdict == "hopeless":
                runs.append(_not_run(setting, attack, letter, outlook.reason))
                continue
            # A pooled reconstruction covers every client at once.
            targets = setting.targets[:1] if isinstance(attack, ActiveAttack) else setting.targets
            jobs.extend(
                _Job(setting, attack, letter, target, cost_weight(attack)) for target in targets
            )
    listener.begin(len(jobs))
    seconds = plan.seconds
    main = Watch(
        None if seconds is None else seconds * (1 - COMPARISON_SHARE * bool(plan.alternatives)),
        parent=stop,
    )
    jobs.sort(key=lambda job: job.weight)
    for index, job in enumerate(jobs):
        if stop.stopped:
            break
        left = main.remaining()
        weight = sum(other.weight for other in jobs[index:])
        allowance = None if left is None else max(left, 1.0) * job.weight / weight
        run = _run(job, plan, allowance, out, listener, stop)
        runs.append(run)
        listener.done(run)
    comparisons = _compare(plan, runs, out, listener, stop)
    report = Report(
        runs=tuple(runs),
        comparisons=tuple(comparisons),
        letters=plan.letters,
        diagnoses=diagnoses,
        facts=_facts(plan),
        command=plan.command,
        source=plan.source,
        complete=not stop.stopped,
        seconds=time.perf_counter() - begun,
    )
    if out is not None:
        report.save(out)
    return report


def _compare(
    plan: Plan,
    runs: Sequence[Run],
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> list[Comparison]:
    """The strongest attacks of the first setting again, under each alternative."""
    if not plan.alternatives:
        return []
    first = plan.settings[0]
    battery = [
        (key, _informed(letter, plan.letters))
        for key, letter in _battery([run for run in runs if run.setting == first.name])
    ]
    attacks = {
        attack.key: attack
        for attack in presets(
            [key for key, _ in battery], plan.attack_parameters, published=plan.seconds is None
        )
    }
    comparisons: list[Comparison] = []
    cases = {"as configured": first.defenses, **plan.alternatives}
    # The same time for every defense, whatever came before: an attack that gets less of it would
    # make a defense look better.
    pieces = max(len(plan.alternatives) * len(battery), 1)
    allowance = None if plan.seconds is None else COMPARISON_SHARE * plan.seconds / pieces
    for name, defenses in cases.items():
        setting = replace(first, defenses=defenses, targets=first.targets[:1])
        found: list[Run] = []
        for key, letter in battery:
            if stop.stopped:
                return comparisons
            if name == "as configured":
                found += [
                    run for run in runs
                    if (run.setting, run.attack) == (first.name, key) and run.status != "not run"
                ][:1]  # fmt: skip
                continue
            job = _Job(setting, attacks[key], letter, setting.targets[0], 1.0)
            run = _run(job, plan, allowance, out, listener, stop)
            found.append(run)
            listener.done(run)
        local = not isinstance(first.protocol, FedSGD)
        utility = accuracy_under(defenses, local=local, seed=plan.seed, watch=Watch(parent=stop))
        comparisons.append(
            Comparison(
                name,
                tuple(defense_json(d) for d in defenses),
                tuple(found),
                utility.accuracy,
                utility.reason,
            )
        )
    return comparisons


def _battery(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The strongest passive and the strongest active attack that leaked, with their letters."""
    chosen: dict[bool, Run] = {}
    for run in runs:
        if run.scores is None:
            continue
        active = run.letter in "FGH"
        rank = (VERDICTS.index(run.verdict), run.scores.psnr.mean)
        held = chosen.get(active)
        if held is None or held.scores is None or rank > (
            VERDICTS.index(held.verdict), held.scores.psnr.mean,
        ):  # fmt: skip
            chosen[active] = run
    return [(run.attack, run.letter) for run in chosen.values()]


def _informed(letter: str, letters: Sequence[str]) -> str:
    """The chosen letter that knows most among those that know at least as much as ``letter``.

    A defense is judged against the adversary that knows its mechanism, if one was chosen; a weaker
    one's failure may only mean that it was not told.
    """
    least = LETTERS[letter]
    stronger = [
        other
        for other in letters
        if LETTERS[other].active == least.active and not least.knowledge & ~LETTERS[other].knowledge
    ]
    return max(stronger, key=lambda other: len(LETTERS[other].knowledge.names()), default=letter)


def _run(
    job: _Job,
    plan: Plan,
    allowance: float | None,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Run:
    vantage = job.setting.effective_vantage
    live = job.setting.stage(letter=job.letter, seed=plan.seed)
    recipe = job.attack.recipe(plan.seed, live.scenario.to_json())
    cache = None if out is None else out / "runs" / _identity(job, recipe.content_hash)
    if cache is not None and (kept := _kept(cache)) is not None:
        return kept
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
        public=_public(job.setting, trial.truth.images).to(trial.images.dtype),
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
        _keep(cache, run)
        shutil.rmtree(progress, ignore_errors=True)
    return run


def verdict(scores: Scores) -> str:
    """The strongest honest word for a result.

    ``exact leak``: at least one original equals a candidate within rounding. ``recognisable``: at
    least one is above 20 dB *and* the mean beats the best null baseline. ``label leak only``: the
    labels are right beyond the empty prediction. Otherwise ``not demonstrated``, which never
    means safe.
    """
    if scores.success["exact"].successes:
        return VERDICTS[3]
    best = max(image.psnr for image in scores.images if image.candidate is not None) if any(
        image.candidate is not None for image in scores.images
    ) else float("-inf")  # fmt: skip
    if best >= RECOGNISABLE_PSNR and best > scores.baselines[scores.best_baseline].psnr:
        return VERDICTS[2]
    if scores.labels is not None and scores.labels.exact_batch:
        return VERDICTS[1]
    return VERDICTS[0]


def _not_run(setting: Setting, attack: Attack, letter: str, reason: str) -> Run:
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


def _public(setting: Setting, like: Tensor) -> Tensor:
    """Public images in the victims' shape, for the null baselines."""
    if setting.surrogate is not None:
        return setting.surrogate.images
    channels, height, width = like.shape[1:]
    images = patches(max(height, width), 64, part="surrogate").images[:, :, :height, :width]
    if channels == 3:
        return images
    return images.mean(1, keepdim=True).expand(-1, channels, -1, -1)


# -- what survives a kill -------------------------------------------------------------------------


def _identity(job: _Job, recipe_hash: str) -> str:
    weights = state_hash(model_state(job.setting.model))
    box = json.dumps(job.setting.box.to_json())
    text = f"{recipe_hash}|{weights}|{job.target}|{box}|{job.setting.victims.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _keep(stem: Path, run: Run) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    if run.pictures is not None:
        save_file({"pictures": run.pictures.contiguous()}, stem.with_suffix(".safetensors"))
    partial = stem.with_suffix(".partial")
    partial.write_text(json.dumps(run.to_json()), encoding="utf-8")
    os.replace(partial, stem.with_suffix(".json"))


def _kept(stem: Path) -> Run | None:
    """A finished run, or None if there is none or it is damaged (it is then run again)."""
    try:
        values = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        pictures = load_file(stem.with_suffix(".safetensors"))["pictures"]
        return Run.from_json(values, pictures)
    except (FileNotFoundError, json.JSONDecodeError, SafetensorError, KeyError, TypeError):
        return None


def _facts(plan: Plan) -> dict[str, Any]:
    first = plan.settings[0]
    return {
        "leakatlas": leakatlas.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "budget_seconds": plan.seconds,
        "seed": plan.seed,
        "model": type(first.model).__name__,
        "settings": [
            {
                "name": setting.name,
                "images": len(setting.victims),
                "shape": list(setting.victims.images.shape[1:]),
                "clients": setting.clients,
                "protocol": type(setting.protocol).__name__,
                "parameters": setting.protocol.to_json(),
                "defenses": [defense_json(d) for d in setting.defenses],
                "vantage": setting.effective_vantage.value,
                "grants": sorted(grant.value for grant in setting.grants),
            }
            for setting in plan.settings
        ],
    }
