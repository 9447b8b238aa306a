"""Who gets which part of an audit's budget: closed forms, rehearsals, then what rehearsed best.

Closed forms take seconds and come first. Attacks that iterate are rehearsed, each with the same
time for each of its trials; what is left goes to them in the order and in proportion of what they
rebuilt of the adversary's own images, as schedules planned to fit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leakatlas.attacks.api import ActiveAttack, Attack, Outlook
from leakatlas.audit import control, process, strangers
from leakatlas.audit.jobs import Job, finished, not_run, run_job
from leakatlas.audit.labels import Reader, needed
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting
from leakatlas.audit.rehearsal import LEAST, Rehearsal, rehearse, stages
from leakatlas.audit.schedule import LONGEST, fits, pace, shares
from leakatlas.audit.start import Start
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import View
from leakatlas.report import Run
from leakatlas.threat import LETTERS, Knowledge

REHEARSED = 0.4
"""Share of the iterating attacks' time that their rehearsals may take, where nothing is kept."""

PACED = 0.2
"""Share of that time that may go into timing attacks, where none is rehearsed."""

CLOSED = 0.4
"""Share of the attacks' time after which closed forms give way to attacks that iterate."""

LATE = 0.25
"""Share of what is left that waits for closed forms which had to give way."""

SLACK = 1.5
"""A planned run may take so many times its allowance before its schedule is cut: what it overruns,
later runs are not given."""

IMAGES = 2
"""Batches of public images for each trial, at most."""


@dataclass(frozen=True)
class Readied:
    """An iterating attack on one setting, ready for its targets.

    Args:
        attack: With the parameters that the rehearsal chose; its length not yet planned.
        pace: Seconds of an iteration; None where it could not be timed.
        rehearsal: How it was chosen, or None.
        reason: Why there was no rehearsal.
        fixed: Length that the user set, or None.
        reader: Reads the labels of an update, where they must be read and the attack takes them.
    """

    attack: Attack
    pace: float | None
    rehearsal: Rehearsal | None
    reason: str = ""
    fixed: int | None = None
    reader: Reader | None = None

    def told(self) -> dict[str, Any]:
        """The rehearsal for recipe and report."""
        if self.rehearsal is not None:
            rule = {} if self.reader is None else {"labels": self.reader.to_json()}
            return {**self.rehearsal.to_json(), **rule}
        return {"refused": self.reason} if self.reason else {}

    def lasting(self, seconds: float) -> Attack:
        """The attack with as many iterations as fit into ``seconds``."""
        if self.pace is None:
            return self.attack
        own = control.part(self.attack) * seconds
        return self.attack.lasting(fits(own, self.pace, self.fixed or LONGEST))


def iterates(attack: Attack) -> bool:
    """Whether a schedule can be planned: a passive attack that counts its iterations."""
    return not isinstance(attack, ActiveAttack) and attack.length is not None


def spend(
    jobs: Sequence[Job],
    plan: Plan,
    main: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[Run]:
    """Every job's run, in the order in which the budget repays most.

    Args:
        jobs: Of all settings.
        plan: Seed, execution, whether to rehearse.
        main: The budget of these runs.
        out: Folder that keeps finished runs.
        listener: Told about progress.
        stop: Ends the audit; what was not reached is left out.
    """
    waiting: list[Job] = []
    for job in jobs:
        kept = finished(job, plan, out)
        if kept is None:
            waiting.append(job)
        else:
            yield kept
    timed = main.remaining() is not None
    long = [job for job in waiting if timed and iterates(job.attack)]
    short = [job for job in waiting if job not in long]
    # Masks on large models take the simulated clients minutes: what needs them comes last.
    short.sort(key=lambda job: (job.setting.hides_updates, job.weight))
    closing = time.perf_counter() + CLOSED * (main.remaining() or 0.0)
    late: list[Job] = []
    weight = sum(job.weight for job in waiting)
    for job in short:
        if stop.stopped:
            return
        if timed and long and (job.setting.hides_updates or time.perf_counter() > closing):
            late.append(job)
            continue
        yield run_job(job, plan, _allowance(main, job.weight / weight), out, listener, stop)
        weight -= job.weight
    yield from _spend_on_schedules(long, plan, _leaving(main, late), out, listener, stop)
    for job in late:  # closed forms: each may take what is left
        if stop.stopped:
            return
        if _over(main):
            yield unreached(job)
            continue
        yield run_job(job, plan, _allowance(main, 1.0), out, listener, stop)


def _allowance(main: Watch, share: float) -> float | None:
    left = main.remaining()
    return None if left is None else max(left, 1.0) * share


def _over(main: Watch) -> bool:
    left = main.remaining()
    return left is not None and left <= 0


def _leaving(main: Watch, late: Sequence[Job]) -> Watch:
    """The budget of the iterating attacks: all that is left, but for what comes after them."""
    left = main.remaining()
    if left is None or not late:
        return main
    return Watch(max(left, 0.0) * (1 - LATE), parent=main)


def unreached(job: Job) -> Run:
    """The entry of a job whose turn did not come: its outcome is open, and more time would tell."""
    ended = Outlook("unknown", "the budget ended before it began")
    return not_run(
        replace(job.setting, targets=(job.target,)),
        job.attack,
        Start(job.letter, ended, "refused", "give it more time, as with --budget"),
    )


def _spend_on_schedules(
    jobs: Sequence[Job],
    plan: Plan,
    main: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[Run]:
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.setting.name, job.attack.key), []).append(job)
    if not groups:
        return
    total = max(main.remaining() or 0.0, 0.0)
    share = REHEARSED if plan.rehearsal else 0.0
    each = total * (1 - share) / len(jobs)
    costs = {key: rehearsal_cost(group[0].attack) for key, group in groups.items()}
    ready: dict[tuple[str, str], Readied] = {}
    closing = time.perf_counter() + max(share, PACED) * total
    # Where there is most to choose, first: what comes too late runs without a rehearsal.
    left = sum(costs.values())
    for key in sorted(groups, key=lambda key: -costs[key]):
        if stop.stopped:
            return
        first = groups[key][0]
        part = (closing - time.perf_counter()) * costs[key] / left
        left -= costs[key]
        if part <= 0:
            ready[key] = _carried_over(first, ready.values(), "the budget leaves no time for it")
            continue
        listener.run(f"{first.setting.name}: {first.attack.key}, rehearsal", 0.0)
        at = readied(first, plan, seconds=part * bool(share), allowance=each, stop=stop)
        if at.rehearsal is None and plan.rehearsal:
            at = _carried_over(first, ready.values(), at.reason, at)
        ready[key] = at
    gains = [_gain(ready[job.setting.name, job.attack.key]) for job in jobs]
    best = max((gain for gain in gains if gain is not None), default=0.0)
    known = [best / 2 if gain is None else gain for gain in gains]
    order = sorted(range(len(jobs)), key=lambda index: -known[index])
    for position, index in enumerate(order):
        if stop.stopped:
            return
        job = jobs[index]
        if _over(main):
            yield unreached(job)
            continue
        at = ready[job.setting.name, job.attack.key]
        share = shares([known[i] for i in order[position:]])[0]
        allowance = max(main.remaining() or 0.0, 0.0) * share
        attack = labelled(at.lasting(allowance), at, job, plan)
        made = replace(job, attack=attack, preset=job.attack, rehearsal=at.told())
        yield run_job(made, plan, SLACK * allowance, out, listener, stop)


def _carried_over(
    job: Job, others: Iterable[Readied], reason: str, at: Readied | None = None
) -> Readied:
    """An attack that was not rehearsed on a setting, as the same one was chosen on another.

    Args:
        job: What is to be run.
        others: Those that are ready.
        reason: Why it was not rehearsed.
        at: What is known of it, or None.
    """
    at = at or Readied(job.attack, None, None, reason)
    for other in others:
        found = other.rehearsal
        if found is not None and found.attack == job.attack.key:
            words = f"{reason}; {found.variant!r}, chosen on another set-up, was taken"
            return replace(at, attack=other.attack, reason=words)
    return at


def rehearsal_cost(attack: Attack) -> float:
    """Iterations of a whole rehearsal in units of the planned length."""
    unit = 1_000
    several = len(distinct_variants(attack, {}))
    return sum(stage.cost for stage in stages(several, unit, IMAGES)) / unit


def readied(job: Job, plan: Plan, *, seconds: float, allowance: float, stop: Watch) -> Readied:
    """Time an iterating attack on a job's view, and rehearse it.

    Args:
        job: The first of the jobs that share the result.
        plan: Seed, parameters that the user set, whether to rehearse.
        seconds: What the rehearsal may take.
        allowance: What the victim's run may take.
        stop: Ends it early.
    """
    changes = plan.attack_parameters.get(job.attack.key, {})
    fixed = job.attack.length if set(changes) & set(job.attack.counts) else None
    try:
        live = job.setting.stage(letter=job.letter, seed=plan.seed)
        view, _ = harness.observe(
            live,
            job.attack,
            target=job.target,
            seed=plan.seed,
            adversary=process.adversary(plan),
        )
        job.attack.check(view)
        run = process.attacker(plan, live)
        at = pace(job.attack, view, watch=stop, seed=plan.seed, run=run)
    # Whatever an attack raises when it is tried out, its run will raise too, and that is the run's
    # own error; here it only means that nothing can be planned.
    except (Exception, SystemExit) as problem:
        return Readied(job.attack, None, None, _first_words(problem), fixed)
    if at is None or not plan.rehearsal:
        return Readied(job.attack, at, None, "", fixed)
    public = public_images(job.setting, view)
    reader: Reader | None = None
    if hasattr(job.attack, "labels") and "labels" not in changes and needed(view):
        try:
            reader = Reader(view, public, seed=plan.seed)
        except LeakAtlasError as problem:
            return Readied(job.attack, at, None, str(problem), fixed)
    length = fits(allowance, at, fixed or LONGEST)
    if seconds < at * min(LEAST, length):
        return Readied(job.attack, at, None, "the budget leaves no time for a rehearsal", fixed)
    try:
        found = rehearse(
            view,
            distinct_variants(job.attack, changes),
            public,
            planned=length,
            images=IMAGES,
            seconds=seconds,
            per_iteration=at,
            watch=Watch(1.5 * seconds, parent=stop),
            seed=plan.seed,
            run=run,
        )
    except (Exception, SystemExit) as problem:  # as above
        return Readied(job.attack, at, None, _first_words(problem), fixed)
    chosen = type(job.attack).from_json(dict(found.parameters))
    return Readied(chosen, found.per_iteration, found, "", fixed, reader)


def _first_words(problem: BaseException) -> str:
    if isinstance(problem, LeakAtlasError):
        return str(problem)
    return f"{type(problem).__name__}: {problem}"


def labelled(attack: Attack, at: Readied, job: Job, plan: Plan) -> Attack:
    """The attack with the labels that the rehearsed rule reads from this target's update."""
    if at.reader is None:
        return attack
    live = job.setting.stage(letter=job.letter, seed=plan.seed)
    view, _ = harness.observe(
        live, attack, target=job.target, seed=plan.seed, adversary=process.adversary(plan)
    )
    return type(attack).from_json({**attack.to_json(), "labels": at.reader(view)})


def distinct_variants(attack: Attack, changes: Any) -> dict[str, Attack]:
    """The attack's variants under the user's changes, equal ones once.

    Lengths do not count: a rehearsal and a plan set them.
    """
    made: dict[str, Attack] = {}
    for name, variant in type(attack).variants().items():
        changed = type(attack).from_json({**variant.to_json(), **changes})
        if changed.lasting(1_000) not in [other.lasting(1_000) for other in made.values()]:
            made[name] = changed
    return made


def public_images(setting: Setting, view: View) -> Any:
    """The surrogate images where the adversary holds them, bundled photos of strangers else."""
    if LETTERS[view.letter].knowledge & Knowledge.SURROGATE and setting.surrogate is not None:
        return setting.surrogate
    return strangers.photos_like(setting.victims)


def _gain(at: Readied) -> float | None:
    return None if at.rehearsal is None else at.rehearsal.gain
