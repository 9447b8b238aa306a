"""The attacks that iterate: timed, rehearsed, and run with as many iterations as fit.

What they cost is measured in this run. The most promising attack of each set-up, and one for every
letter that would have none, are sure of a decent run; the others of a bare try, if that fits beside
it. The rehearsals then say what each rebuilds of the adversary's own images, and what is left
beyond goes to the attacks in the order and in proportion of that. A machine that slows down
meanwhile makes schedules shorter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leakatlas.audit.jobs import Job, run_job, unreached, would_not_fit
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan
from leakatlas.audit.ready import (
    Readers,
    Readied,
    Timed,
    carried_over,
    distinct_variants,
    guessed,
    planned_for,
    readied,
    rehearsal_cost,
    timed,
)
from leakatlas.audit.schedule import Key, Try, reserved, shares
from leakatlas.blocks.watch import Watch
from leakatlas.report import Run
from leakatlas.threat import LETTERS

TIMED = 0.25
"""Share of the iterating attacks' time that finding out what they cost may take; on a large network
a few iterations of each would take all of it. The most promising is timed in any case."""

REHEARSED = 0.4
"""Share of the iterating attacks' time, beyond what tries take, that their rehearsals may take."""

DECENT = 2
"""A run that a leading attack is sure of is so many times as long as a bare try."""

SLACK = 1.5
"""A planned run may take so many times its allowance before its schedule is hurried to its end:
what it overruns, later runs are not given."""

UNTIMED = "not tried: the budget left no time to find out what it costs here"

JITTER = 1.0
"""Seconds that a run may take besides, for a machine that halts a short one for a moment."""

PACES = (0.5, 8.0)
"""Beyond so many times its measured pace a run says nothing of the others'."""


def key_of(job: Job) -> Key:
    """What jobs that differ in their target alone share."""
    return job.setting.name, job.attack.key


@dataclass
class Iterating:
    """Spends a budget on attacks that iterate, and remembers what they cost.

    Args:
        plan: Seed, letters, whether to rehearse.
        out: Folder that keeps finished runs.
        listener: Told about progress.
        stop: Ends everything early.
    """

    plan: Plan
    out: Path | None
    listener: Listener
    stop: Watch
    _paces: dict[Key, Timed] = field(default_factory=dict)
    _ready: dict[Key, Readied] = field(default_factory=dict)
    _readers: Readers = field(default_factory=dict)
    _slower: float = 1.0
    """How many times slower the machine has become since the attacks were timed."""

    def spend(self, jobs: Sequence[Job], main: Watch) -> Iterator[tuple[Job, Run]]:
        """The runs, what rehearsed best first; what does not fit is not begun, and said.

        Args:
            jobs: Of all settings.
            main: Their part of the budget.
        """
        self._time(jobs, main)
        timed_ones = [job for job in jobs if key_of(job) in self._paces]
        self._rehearse(self._begun(timed_ones, main), main)
        if self.stop.stopped:
            return
        yield from self._run_in_order(timed_ones, self._sure(timed_ones, main), main)
        if not self.stop.stopped:
            untimed = (job for job in jobs if key_of(job) not in self._paces)
            seed = self.plan.seed
            yield from ((j, unreached(j, UNTIMED, seconds=guessed(j, seed))) for j in untimed)

    def _time(self, jobs: Sequence[Job], main: Watch) -> None:
        """What each attack costs, as far as time goes.

        First the most promising, those with most to choose from: what every letter needs, then all.
        """
        first = {key_of(job): job for job in reversed(jobs)}
        share = Watch(TIMED * (main.remaining() or 0.0), parent=main)
        # Of equals, the later set-ups come later: sorting keeps the order.
        promising = sorted(
            reversed(first), key=lambda key: -len(distinct_variants(first[key].attack, {}))
        )
        early = ambassadors(promising, first, self.plan.letters)
        for key in sorted(promising, key=lambda key: key not in early):
            watch = share if self._paces else main
            if self.stop.stopped or watch.over:
                return
            self._time_one(first[key], watch)

    def _time_one(self, job: Job, watch: Watch) -> None:
        self.listener.run(f"{job.setting.name}: {job.attack.key}, timing", 0.0)
        self._paces[key_of(job)] = timed(job, self.plan, stop=watch)

    def again(self, job: Job, main: Watch, *, keeping: float = 0.0) -> Run | None:
        """A job that did not fit, with what others left over; None if it still does not.

        Args:
            job: That was put off.
            main: What is left.
            keeping: Seconds of that which it leaves to others if it can.
        """
        at = self._ready.get(key_of(job))
        if key_of(job) not in self._paces:
            self._time_one(job, main)
        if at is None:
            paced = self._paces[key_of(job)]
            at = carried_over(
                Readied(paced.attack, paced.pace, None, paced.reason, paced.fixed),
                self._ready.values(),
                "it was put off, and what was left over went to the run",
            )
        left = main.remaining() or 0.0
        least = self._slower * self._least(job)
        if left < least or left <= 0:
            return None
        return self._run(job, at, max(left - keeping, least), main)

    def _least(self, job: Job) -> float:
        return self._paces[key_of(job)].least

    def _sure(self, jobs: Sequence[Job], main: Watch) -> dict[Key, float]:
        """Seconds that each job is sure of, of those that are begun."""
        leads = leading(jobs, self._paces, self.plan.letters)
        tries = []
        for job in jobs:
            at, key = self._paces[key_of(job)], key_of(job)
            long = at.lasting(DECENT) if key in leads.of_settings else at.least
            tries.append(Try(key, at.least, long, leads=key in leads.all))
        return reserved(tries, max(main.remaining() or 0.0, 0.0))

    def _begun(self, jobs: Sequence[Job], main: Watch) -> list[Job]:
        sure = self._sure(jobs, main)
        return [job for job in jobs if key_of(job) in sure]

    def _rehearse(self, jobs: Sequence[Job], main: Watch) -> None:
        """Every attack with the variant that did best, as far as rehearsals fit."""
        first = {key_of(job): job for job in reversed(jobs)}
        free = (main.remaining() or 0.0) - sum(self._least(job) for job in jobs)
        share = REHEARSED if self.plan.rehearsal else 0.0
        closing = time.perf_counter() + share * free
        costs = {key: rehearsal_cost(job.attack) for key, job in first.items()}
        unspent = sum(costs.values())
        # Where there is most to choose, first: what comes too late runs without a rehearsal.
        for key in sorted(first, key=lambda key: -costs[key]):
            if self.stop.stopped:
                return
            job, at = first[key], self._paces[key]
            seconds = max(closing - time.perf_counter(), 0.0) * costs[key] / unspent
            unspent -= costs[key]
            allowance = at.least + max(free, 0.0) * (1 - share) / len(jobs)
            self.listener.run(f"{job.setting.name}: {job.attack.key}, rehearsal", 0.0)
            made = readied(
                at, job, self.plan, seconds=seconds, allowance=allowance, stop=main,
                readers=self._readers,
            )  # fmt: skip
            if made.rehearsal is None and self.plan.rehearsal:
                made = carried_over(made, self._ready.values(), made.reason)
            self._ready[key] = made

    def _run_in_order(
        self, jobs: Sequence[Job], sure: dict[Key, float], main: Watch
    ) -> Iterator[tuple[Job, Run]]:
        """What rehearsed best first; each keeps what it is sure of, however many come before it.

        What was put off comes last, and is tried before anybody has more than it is sure of.
        """
        put_off = [job for job in jobs if key_of(job) not in sure]
        jobs = [job for job in jobs if key_of(job) in sure]
        beyond = sum(self._least(job) for job in put_off)
        gains = [_gain(self._ready[key_of(job)]) for job in jobs]
        best = max((gain for gain in gains if gain is not None), default=0.0)
        known = [best / 4 if gain is None else gain for gain in gains]
        order = sorted(range(len(jobs)), key=lambda index: -known[index])
        for position, index in enumerate(order):
            if self.stop.stopped:
                return
            job, left = jobs[index], main.remaining() or 0.0
            own = self._slower * sure[key_of(job)]
            others = self._slower * sum(sure[key_of(jobs[i])] for i in order[position + 1 :])
            least = self._slower * self._least(job)
            if left < least or left <= 0:
                yield job, would_not_fit(job, least, left)
                continue
            share = shares([known[i] for i in order[position:]])[0]
            free = max(left - own - others - self._slower * beyond, 0.0)
            fits = 1.0 if own + others <= left else left / (own + others)
            allowance = own * fits + free * share
            yield job, self._run(job, self._ready[key_of(job)], max(allowance, least), main)
        for job in sorted(put_off, key=self._least):
            if self.stop.stopped:
                return
            beyond -= self._least(job)
            tried = self.again(job, main, keeping=self._slower * beyond)
            yield job, tried or would_not_fit(job, self._least(job), main.remaining() or 0.0)

    def _run(self, job: Job, at: Readied, allowance: float, main: Watch) -> Run:
        planned = at.lasting(allowance, slower=self._slower)
        made = planned_for(job, planned, at, self.plan)
        run = run_job(made, self.plan, SLACK * allowance + JITTER, self.out, self.listener, main)
        if at.pace is not None and run.tried:
            steps = int(run.notes.get("iterations_made", made.attack.length or 1))
            ratio = run.seconds / at.pace.seconds(steps)
            self._slower = (self._slower + min(max(ratio, PACES[0]), PACES[1])) / 2
        return run


def ambassadors(keys: Sequence[Key], first: Mapping[Key, Job], letters: Sequence[str]) -> set[Key]:
    """The first of all attacks, and the first of each letter that none before it stands for.

    Args:
        keys: Of the attacks, the most promising first.
        first: A job of each.
        letters: Of the audit, weakest first.
    """
    chosen = set(keys[:1])
    for letter in letters:
        able = [key for key in keys if stands_for(first[key].letter, letter)]
        if able and not chosen.intersection(able):
            chosen.add(able[0])
    return chosen


def _gain(at: Readied) -> float | None:
    return None if at.rehearsal is None else at.rehearsal.gain


@dataclass(frozen=True)
class Leads:
    """Attacks that come first.

    Args:
        of_settings: The most promising of each set-up.
        of_letters: One for every letter that none of these stands for.
    """

    of_settings: frozenset[Key]
    of_letters: frozenset[Key]

    @property
    def all(self) -> frozenset[Key]:
        """Both."""
        return self.of_settings | self.of_letters


def leading(jobs: Sequence[Job], paces: dict[Key, Timed], letters: Sequence[str]) -> Leads:
    """Which attacks lead, before any rehearsal: those with most variants to choose from.

    Args:
        jobs: Of all settings, the most important setting first.
        paces: What they cost.
        letters: Of the audit.
    """
    first = {key_of(job): job for job in reversed(jobs)}
    keys = [key for key in dict.fromkeys(map(key_of, jobs)) if paces[key].pace is not None]
    promise = {
        key: (len(distinct_variants(first[key].attack, {})), -paces[key].least) for key in keys
    }
    best: dict[str, Key] = {}
    for key in keys:
        if key[0] not in best or promise[key] > promise[best[key[0]]]:
            best[key[0]] = key
    chosen = set(best.values())
    alone: set[Key] = set()
    for letter in letters:
        able = [key for key in keys if stands_for(first[key].letter, letter)]
        if able and not chosen.union(alone).intersection(able):
            nearest = [key for key in able if key[0] == able[0][0]]
            alone.add(min(nearest, key=lambda key: paces[key].least))
    return Leads(frozenset(chosen), frozenset(alone))


def stands_for(weaker: str, letter: str) -> bool:
    """Whether a run under a letter counts for another one, which knows at least as much."""
    return not LETTERS[weaker].knowledge & ~LETTERS[letter].knowledge
