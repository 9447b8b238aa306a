"""Who gets which part of an audit's budget: closed forms, rehearsals, then what rehearsed best.

Closed forms take seconds and come first. Attacks that iterate are timed, and what does not fit is
left out and said before anything is spent on it. The others are rehearsed; each is sure of the time
that a try takes, and what is left beyond goes to them in the order and in proportion of what they
rebuilt of the adversary's own images, as schedules planned to fit. A machine that slows down
meanwhile makes schedules shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from leakatlas.attacks.api import Outlook
from leakatlas.audit.jobs import Job, finished, not_run, run_job
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan
from leakatlas.audit.ready import (
    Readied,
    Timed,
    carried_over,
    iterates,
    labelled,
    readied,
    rehearsal_cost,
    timed,
)
from leakatlas.audit.schedule import shares
from leakatlas.audit.start import Start
from leakatlas.blocks.watch import MORE_TIME, Watch
from leakatlas.report import Run

REHEARSED = 0.4
"""Share of the iterating attacks' time, beyond what tries take, that their rehearsals may take."""

CLOSED = 0.35
"""Share of the attacks' time after which closed forms give way to attacks that iterate."""

LATE = 0.25
"""Share of what is left that waits for closed forms which had to give way."""

TRIES = 0.9
"""Share of the iterating attacks' time that bare tries may take together; the rest is for a machine
that becomes slower. What does not fit is not begun, the most expensive first."""

SLACK = 1.5
"""A planned run may take so many times its allowance before its schedule is hurried to its end:
what it overruns, later runs are not given."""

SLOWEST = 8.0
"""Beyond so many times its measured pace a run says nothing of the others'."""

Key = tuple[str, str]
"""A setting and an attack: jobs that differ in their target alone share what is measured."""


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
    limited = main.remaining() is not None
    long = [job for job in waiting if limited and iterates(job.attack)]
    # What is learned takes all it is given.
    short = sorted(
        (job for job in waiting if job not in long),
        key=lambda job: (job.attack.length is not None, job.setting.hides_updates),
    )
    total = main.remaining()
    closed = None if total is None else total * (CLOSED if long else 1.0)
    pool = Watch(closed, parent=main)
    late: list[Job] = []
    for position, job in enumerate(short):
        if stop.stopped:
            return
        # A round under masks takes the simulated clients long and ends when it ends: it may take
        # what others leave, never what they need.
        if long and (job.setting.hides_updates or over(pool)):
            late.append(job)
        elif over(main):
            yield unreached(job)
        else:
            part = _part(job, len(short) - position)
            yield run_job(job, plan, _allowance(pool, part), out, listener, main)
    yield from _spend_on_schedules(long, plan, _leaving(main, late), out, listener, stop)
    for position, job in enumerate(late):
        if stop.stopped:
            return
        if over(main):
            yield unreached(job)
            continue
        allowance = _allowance(main, _part(job, len(late) - position))
        yield run_job(job, plan, allowance, out, listener, main)


SEARCH = 3.0
"""A closed form that searches may take so many times its equal part."""


def _part(job: Job, waiting: int) -> float:
    """Share of what is left that a job may take, of as many as are waiting.

    What is learned takes all it is given, a search may; a round under masks takes what it takes.
    """
    if job.setting.hides_updates:
        return 1.0
    return min(1.0, (1.0 if job.attack.length is not None else SEARCH) / waiting)


def _allowance(main: Watch, share: float) -> float | None:
    left = main.remaining()
    return None if left is None else max(left, 1.0) * share


def over(watch: Watch) -> bool:
    """Whether a budget has ended."""
    left = watch.remaining()
    return left is not None and left <= 0


def _leaving(main: Watch, late: Sequence[Job]) -> Watch:
    """The budget of the iterating attacks: all that is left, but for what comes after them."""
    left = main.remaining()
    if left is None or not late:
        return main
    return Watch(max(left, 0.0) * (1 - LATE), parent=main)


def unreached(
    job: Job, why: str = "the budget ended before it began", *, wants: str = MORE_TIME
) -> Run:
    """The entry of a job whose turn did not come: its outcome is open, and ``wants`` would tell."""
    return not_run(
        replace(job.setting, targets=(job.target,)),
        job.attack,
        Start(job.letter, Outlook("unknown", why), "refused", wants),
    )


def would_not_fit(job: Job, least: float, left: float) -> Run:
    """The entry of a job that was not begun, because a try of it takes longer than there is."""
    why = (
        f"not tried: would not fit; {job.attack.fewest} iterations take about {least:.0f} s here, "
        f"and its share of the budget is {max(left, 0.0):.0f} s"
    )
    return unreached(job, why)


def _key(job: Job) -> Key:
    return job.setting.name, job.attack.key


def _spend_on_schedules(
    jobs: Sequence[Job],
    plan: Plan,
    main: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[Run]:
    groups: dict[Key, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_key(job), []).append(job)
    paces: dict[Key, Timed] = {}
    for key, (first, *_) in groups.items():
        if stop.stopped:
            return
        listener.run(f"{first.setting.name}: {first.attack.key}, timing", 0.0)
        paces[key] = timed(first, plan, stop=main)
    left = max(main.remaining() or 0.0, 0.0)
    least = {key: paces[key].least for key in groups}
    begun = fitting([(key, least[key]) for key in map(_key, jobs)], TRIES * left)
    for job in jobs:
        if _key(job) not in begun:
            yield would_not_fit(job, least[_key(job)], TRIES * left / len(jobs))
    jobs = [job for job in jobs if _key(job) in begun]
    ready = _rehearsed(jobs, paces, plan, main, listener, stop)
    yield from _run_in_order(jobs, ready, least, plan, main, out, listener, stop)


def fitting(tries: Sequence[tuple[Key, float]], seconds: float) -> frozenset[Key]:
    """Which attacks are begun: all but the most expensive, until the tries of the others fit.

    Args:
        tries: Seconds of a bare try, for every job.
        seconds: What they may take together.
    """
    kept = list(tries)
    while kept and sum(cost for _, cost in kept) > seconds:
        dearest = max(kept, key=lambda one: one[1])[0]
        kept = [one for one in kept if one[0] != dearest]
    return frozenset(key for key, _ in kept)


def _rehearsed(
    jobs: Sequence[Job],
    paces: Mapping[Key, Timed],
    plan: Plan,
    main: Watch,
    listener: Listener,
    stop: Watch,
) -> dict[Key, Readied]:
    """Every attack with the variant that did best, as far as rehearsals fit."""
    first = {_key(job): job for job in reversed(jobs)}
    free = (main.remaining() or 0.0) - sum(paces[_key(job)].least for job in jobs)
    share = REHEARSED if plan.rehearsal else 0.0
    closing = time.perf_counter() + share * free
    costs = {key: rehearsal_cost(job.attack) for key, job in first.items()}
    ready: dict[Key, Readied] = {}
    # Where there is most to choose, first: what comes too late runs without a rehearsal.
    unspent = sum(costs.values())
    for key in sorted(first, key=lambda key: -costs[key]):
        if stop.stopped:
            return {}
        job, at = first[key], paces[key]
        seconds = max(closing - time.perf_counter(), 0.0) * costs[key] / unspent
        unspent -= costs[key]
        allowance = at.least + max(free, 0.0) * (1 - share) / len(jobs)
        listener.run(f"{job.setting.name}: {job.attack.key}, rehearsal", 0.0)
        made = readied(at, job, plan, seconds=seconds, allowance=allowance, stop=main)
        if made.rehearsal is None and plan.rehearsal:
            made = carried_over(made, ready.values(), made.reason)
        ready[key] = made
    return ready


def _run_in_order(
    jobs: Sequence[Job],
    ready: Mapping[Key, Readied],
    least: Mapping[Key, float],
    plan: Plan,
    main: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[Run]:
    """The runs, what rehearsed best first; each is sure of a try, however many come before it."""
    if not ready:
        return
    gains = [_gain(ready[_key(job)]) for job in jobs]
    best = max((gain for gain in gains if gain is not None), default=0.0)
    known = [best / 4 if gain is None else gain for gain in gains]
    order = sorted(range(len(jobs)), key=lambda index: -known[index])
    slower = 1.0
    for position, index in enumerate(order):
        if stop.stopped:
            return
        job, at = jobs[index], ready[_key(jobs[index])]
        own = slower * least[_key(job)]
        others = slower * sum(least[_key(jobs[i])] for i in order[position + 1 :])
        left = main.remaining() or 0.0
        if left < own or left <= 0:
            yield would_not_fit(job, own, left)
            continue
        share = shares([known[i] for i in order[position:]])[0]
        allowance = own + max(left - own - others, 0.0) * share
        attack = labelled(at.lasting(allowance, slower=slower), at, job, plan)
        made = replace(job, attack=attack, preset=job.attack, rehearsal=at.told())
        run = run_job(made, plan, SLACK * allowance, out, listener, main)
        if at.pace is not None and run.tried:
            steps = int(run.notes.get("iterations_made", attack.length or 1))
            ratio = run.seconds / at.pace.seconds(steps)
            slower = (slower + min(max(ratio, 1.0), SLOWEST)) / 2
        yield run


def _gain(at: Readied) -> float | None:
    return None if at.rehearsal is None else at.rehearsal.gain
