"""Who gets which part of an audit's budget, and when.

First the closed forms that take seconds. Then the attacks that iterate, see :mod:`.iterating`: the
strongest of each set-up are sure of a decent run, whatever else there is. Then what takes any time
that it is given, or cannot be ended: attacks that learn, and rounds under masks; a part of the time
waits for them. What nobody spent goes to those who were refused for want of it.

Attacks that iterate are ordered by their rehearsal. Those that change the model, and closed forms,
are not rehearsed: a try on public images would take the same preparation, a round and a reading, as
much as on the victim, so it is the victim that is tried. Their order is declared, not measured:
closed forms, then what learns; reports say so.

All costs are measured in this very run: a slower machine, or a busy one, shortens schedules before
it silences attacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from leakatlas.audit.iterating import Iterating
from leakatlas.audit.jobs import Job, finished, forget, run_job, unreached
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan
from leakatlas.audit.ready import guessed, iterates
from leakatlas.blocks.watch import MORE_TIME, Watch
from leakatlas.report import Run

CLOSED = 0.35
"""Share of the attacks' time after which closed forms give way to attacks that iterate."""

LATE = 0.4
"""Largest share of what closed forms leave that waits for attacks that learn and rounds under
masks."""


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
    iterating = Iterating(plan, out, listener, stop)
    lacking: list[tuple[Job, Run]] = []
    for job, run in _in_turn(waiting, iterating, main):
        if lacking_time(run):
            lacking.append((job, run))
        else:
            yield run
    for job, run in lacking:
        yield _again(job, run, iterating, main)


def once_more(
    jobs: Sequence[tuple[Job, Run]],
    plan: Plan,
    main: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[Run]:
    """The runs that lacked time, with what the whole audit left over; only those that had it now.

    Args:
        jobs: With their runs, whatever came of them.
        plan: As in :func:`spend`.
        main: What is left.
        out: As in :func:`spend`.
        listener: As in :func:`spend`.
        stop: As in :func:`spend`.
    """
    left = main.remaining()
    if left is None or stop.stopped:
        return
    worth = [(job, run) for job, run in jobs if lacking_time(run) and AGAIN * run.seconds < left]
    for job, _ in worth:
        forget(job, plan, out)
    for run in spend([job for job, _ in worth], plan, main, out, listener, stop):
        if not lacked_time(run):
            yield run


def lacking_time(run: Run) -> bool:
    """Whether more time might change what a run shows: it was not begun, or cut."""
    return lacked_time(run) or run.status == "cut short"


def lacked_time(run: Run) -> bool:
    """Whether a run was not begun, and more time would change that."""
    return run.status == "refused" and MORE_TIME in run.wants


def _in_turn(jobs: Sequence[Job], iterating: Iterating, main: Watch) -> Iterator[tuple[Job, Run]]:
    """The runs, those that lacked time among them."""
    limited = main.remaining() is not None
    long = [job for job in jobs if limited and iterates(job.attack)]
    others = [job for job in jobs if job not in long]
    late = [job for job in others if long and _takes_any_time(job)]
    # Closed forms first: what is learned takes all that it is given.
    quick = sorted((job for job in others if job not in late), key=_takes_any_time)
    left = main.remaining()
    pool = Watch(None if left is None else left * (CLOSED if long else 1.0), parent=main)
    for job, run in _divided(quick, iterating, pool):
        if long and lacked_time(run):
            late.append(job)
        else:
            yield job, run
    waits = min(LATE, len(late) / max(len(jobs) - len(quick), 1)) * (main.remaining() or 0.0)
    yield from iterating.spend(long, _but_for(main, waits))
    late.sort(key=lambda job: job.attack.length is not None)
    yield from _divided(late, iterating, Watch(waits, parent=main) if long else main)


def _takes_any_time(job: Job) -> bool:
    """Whether a job learns, or plays a round under masks, which nobody can end."""
    return job.attack.length is not None or job.setting.hides_updates


def _divided(jobs: Sequence[Job], around: Iterating, pool: Watch) -> Iterator[tuple[Job, Run]]:
    """One after the other, each with its part of what is left."""
    for position, job in enumerate(jobs):
        if around.stop.stopped:
            return
        if pool.over:
            yield job, unreached(job, seconds=guessed(job, around.plan.seed))
        else:
            part = _part(job, len(jobs) - position)
            allowance = _allowance(pool, part)
            yield job, run_job(job, around.plan, allowance, around.out, around.listener, pool)


def _again(job: Job, before: Run, around: Iterating, main: Watch) -> Run:
    """A job that lacked time, with all that is left; as it was if that is too little."""
    left = main.remaining()
    if around.stop.stopped or (left is not None and left < AGAIN * before.seconds) or main.over:
        return before
    forget(job, around.plan, around.out)
    if iterates(job.attack) and left is not None:
        return around.again(job, main) or before
    run = run_job(job, around.plan, left, around.out, around.listener, main)
    return before if lacked_time(run) else run


AGAIN = 2.0
"""A run that was cut short is repeated where so many times what it had is left."""

SEARCH = 3.0
"""A closed form that searches may take so many times its equal part."""


def _part(job: Job, waiting: int) -> float:
    """Share of what is left that a job may take, of as many as are waiting.

    What is learned takes all it is given, a search may; a round under masks takes what it takes.
    """
    if job.setting.hides_updates:
        return 1.0
    return min(1.0, (1.0 if job.attack.length is not None else SEARCH) / waiting)


def _allowance(watch: Watch, share: float) -> float | None:
    left = watch.remaining()
    return None if left is None else max(left, 1.0) * share


def _but_for(main: Watch, seconds: float) -> Watch:
    """A budget that leaves so many seconds of another one."""
    left = main.remaining()
    return main if left is None else Watch(max(left - seconds, 0.0), parent=main)
