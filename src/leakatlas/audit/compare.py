"""Defenses compared: the strongest attacks again under each set, and its price in accuracy."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leakatlas.attacks.api import Attack
from leakatlas.audit import control
from leakatlas.audit.deadline import Deadline
from leakatlas.audit.effort import lacked_time
from leakatlas.audit.iterating import REHEARSED, SLACK
from leakatlas.audit.jobs import Job, finished, run_job, unreached, would_not_fit
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting, presets
from leakatlas.audit.ready import (
    Readied,
    Timed,
    carried_over,
    iterates,
    planned_for,
    readied,
    timed,
)
from leakatlas.audit.schedule import LONGEST, Pace, together
from leakatlas.audit.utility import REFERENCE, Utility, price_of
from leakatlas.blocks.watch import MORE_TIME, Watch
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import Defense, FedSGD, replay
from leakatlas.fl.view import defense_json
from leakatlas.report import Comparison, Run, rank
from leakatlas.threat import LETTERS, Vantage

DEAREST = 0.5
"""Share of the comparisons' time that the clients of one set may take."""

TIMING = 0.5
"""Share of a search's time after which no further set is timed: those that come later are left out,
so that a short budget tries the first few to their end and not all of them not at all."""

MEASURING = 0.1
"""Share of the comparisons' time that measuring the price in accuracy may take, where nothing is
kept."""


def compare(
    plan: Plan,
    runs: Sequence[Run],
    watch: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
    *,
    priced: bool = True,
    deadline: Deadline | None = None,
) -> list[Comparison]:
    """The strongest attacks of the first setting again, under each set of defenses.

    Every set, the configured one included, meets the same attacker: the same letter, a rehearsal
    of the same length against that set, as many iterations, the same seeds. An attack that runs
    longer on one of them would make its defense look worse.

    Args:
        plan: The alternatives.
        runs: On the settings as they are.
        watch: What is left of the budget.
        out: Folder that keeps finished runs.
        listener: Told about progress.
        stop: Ends the comparisons early.
        priced: Whether the accuracy under each set is measured, in a part of the time.
        deadline: Of the whole audit; none if None.
    """
    if not plan.alternatives:
        return []
    first = plan.settings[0]
    battery = [
        (key, _informed(letter, plan.letters))
        for key, letter in _battery([run for run in runs if run.setting == first.name])
    ]
    cases = {"as configured": first.defenses, **plan.alternatives}
    settings = {name: _alone(first, defenses) for name, defenses in cases.items()}
    prices: dict[str, Utility] = {}
    found: dict[str, list[Run]] = {name: [] for name in cases}
    with (deadline or Deadline(0.0, None)).ends():
        if priced:
            _price(prices, plan, settings, watch, stop)
        rounds = len({letter if letter in "FGH" else "" for _, letter in battery})
        affordable, unplayed = _playable(plan, settings, rounds, watch)
        for position, (key, letter) in enumerate(battery):
            left = watch.remaining()
            seconds = None if left is None else max(left, 1.0) / (len(battery) - position)
            duel = _Duel(plan, key, letter, Watch(seconds, parent=watch), out, listener, stop)
            duels = [duel.fight(affordable), duel.left_out(settings, unplayed)]
            for name, run in itertools.chain(*duels):
                found[name].append(run)
                listener.done(run)
    if not stop.stopped:
        for (key, letter), (name, setting) in itertools.product(battery, settings.items()):
            if key not in {run.attack for run in found[name]}:
                duel = _Duel(plan, key, letter, watch, out, listener, stop)
                found[name].append(unreached(duel.job(setting)))
    missing = Utility(None, "the budget ended before its price was measured" if priced else "")
    task = plan.task.name if plan.task else REFERENCE
    return [
        Comparison(
            name,
            tuple(defense_json(d) for d in cases[name]),
            tuple(found[name]),
            (price := prices.get(name, missing)).accuracy,
            price.reason,
            task,
        )
        for name in cases
        if found[name] or not stop.stopped
    ]


def _price(
    prices: dict[str, Utility],
    plan: Plan,
    settings: Mapping[str, Setting],
    watch: Watch,
    stop: Watch,
) -> None:
    """Accuracy under each set, by name, as far as time goes."""
    if watch.over:
        return
    left = watch.remaining()
    allowed = Watch(None if left is None else max(MEASURING * left, 1.0), parent=stop)
    for (name, setting), share in zip(settings.items(), allowed.share(len(settings)), strict=False):
        local = not isinstance(setting.protocol, FedSGD)
        prices[name] = price_of(
            setting.defenses, local=local, seed=plan.seed, watch=share, task=plan.task
        )


def _alone(first: Setting, defenses: Sequence[Defense]) -> Setting:
    """A setting under other defenses: the first target alone, where no other client matters."""
    setting = replace(first, defenses=tuple(defenses), targets=first.targets[:1])
    together = (Defense.setup, Defense.peer, Defense.aggregate)
    joint = any(
        getattr(type(defense), hook.__name__) is not hook
        for defense in setting.defenses
        for hook in together
    )
    if joint or setting.effective_vantage not in (Vantage.WIRE, Vantage.SERVER):
        return setting
    share = len(first.victims) // first.clients
    (target,) = setting.targets
    mine = first.victims.subset(range(target * share, (target + 1) * share))
    return replace(setting, victims=mine, clients=1, targets=(0,))


def _playable(
    plan: Plan, settings: Mapping[str, Setting], rounds: int, watch: Watch
) -> tuple[dict[str, Setting], dict[str, tuple[str, str]]]:
    """The sets whose clients' rounds can be played in time; of the others why not, and the way out.

    Args:
        plan: The seed.
        settings: By name, the configured defenses first.
        rounds: How many rounds of each set will be played.
        watch: The comparisons' budget.
    """
    kept: dict[str, Setting] = {}
    unplayed: dict[str, tuple[str, str]] = {}
    for name, setting in settings.items():
        left = watch.remaining()
        if watch.over:
            unplayed[name] = "the budget ended before it began", MORE_TIME
            continue
        work = sum(defense.workload(setting.model) - 1 for defense in setting.defenses)
        if left is not None and work > 0:
            expected = rounds * work * setting.clients * _gradient_seconds(setting)
            if expected > DEAREST * left:
                why = (
                    f"not tried: would not fit; under {name} the clients' rounds take about "
                    f"{expected:.0f} s here"
                )
                unplayed[name] = why, MORE_TIME
                continue
        try:
            setting.honest_round(plan.seed)
        except LeakAtlasError as problem:  # it may not fit this model; the other sets go on
            why = f"not tried: under {name} a client cannot take part ({problem})"
            unplayed[name] = why, f"leave {name} out, or change what it does not fit"
            continue
        kept[name] = setting
    return kept, unplayed


def _gradient_seconds(setting: Setting) -> float:
    """What one gradient of the loss on one client's images takes here."""
    count = max(len(setting.victims) // setting.clients, 1)
    x = setting.box.normalize(setting.victims.images[:count])
    x = x.to(next(setting.model.parameters()))
    y = setting.victims.labels[:count].to(x.device)
    held = {name: p.detach() for name, p in setting.model.named_parameters()}
    buffers = dict(setting.model.named_buffers())
    seconds = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        replay.gradient(
            setting.model, held, buffers, x, y, loss=setting.protocol.loss, create_graph=False
        )
        seconds = min(seconds, time.perf_counter() - begun)
    return seconds


@dataclass(frozen=True)
class _Duel:
    """One attack against every set of defenses, with equal effort.

    Args:
        plan: Seed, parameters that the user set, whether to rehearse.
        key: Of the attack.
        letter: Under which it runs.
        watch: Its share of the comparisons' time.
        out: Folder that keeps finished runs.
        listener: Told about progress.
        stop: Ends it early.
    """

    plan: Plan
    key: str
    letter: str
    watch: Watch
    out: Path | None
    listener: Listener
    stop: Watch

    def job(self, setting: Setting) -> Job:
        """The attack on one set."""
        (attack,) = presets([self.key], self.plan.attack_parameters,
                            published=self.plan.seconds is None)  # fmt: skip
        return Job(setting, attack, self.letter, setting.targets[0], compared=True)

    def left_out(
        self, settings: Mapping[str, Setting], unplayed: Mapping[str, tuple[str, str]]
    ) -> Iterator[tuple[str, Run]]:
        """The entries of sets whose clients' rounds cannot be played, or not in time."""
        for name, (why, wants) in unplayed.items():
            yield name, unreached(self.job(settings[name]), why, wants=wants)

    def fight(self, settings: Mapping[str, Setting]) -> Iterator[tuple[str, Run]]:
        """The runs."""
        if not settings:
            return
        jobs = {name: self.job(setting) for name, setting in settings.items()}
        length: int | None = None
        waiting: dict[str, Job] = {}
        for name, job in jobs.items():
            before = finished(job, self.plan, self.out)
            if before is None:
                waiting[name] = job
                continue
            length = type(job.attack).from_json(before.recipe["attack"]["parameters"]).length
            yield name, before
        if self.watch.remaining() is not None and all(map(iterates, _attacks(waiting))):
            yield from self._planned(waiting, length)
            return
        lacking: dict[str, Run] = {}
        for position, (name, job) in enumerate(waiting.items()):
            if self.stop.stopped:
                return
            run = self._within(job, len(waiting) - position)
            if lacked_time(run):
                lacking[name] = run
            else:
                yield name, run
        for name, run in lacking.items():  # what the others left is theirs
            again = self._within(waiting[name], 1)
            yield name, run if lacked_time(again) else again

    def _within(self, job: Job, waiting: int) -> Run:
        """A run with its part of what is left, of as many as are waiting."""
        if self.watch.over:
            return unreached(job)
        left = self.watch.remaining()
        each = None if left is None else left / waiting
        return run_job(job, self.plan, each, self.out, self.listener, self.watch)

    def _planned(self, jobs: Mapping[str, Job], length: int | None) -> Iterator[tuple[str, Run]]:
        """Runs of an attack that iterates: timed, rehearsed and equally long against every set.

        Args:
            jobs: By name of the set.
            length: Of the runs against other sets that were kept from before.
        """
        paces: dict[str, Timed] = {}
        enough = (1 - TIMING) * (self.watch.remaining() or 0.0)
        for name, job in jobs.items():
            if self.stop.stopped:
                return
            if self.watch.over or (self.watch.remaining() or 0.0) < enough:
                yield name, unreached(job)
                continue
            self.listener.run(f"{name}: {self.key}, timing", 0.0)
            paces[name] = timed(job, self.plan, stop=self.watch)
        left = max(self.watch.remaining() or 0.0, 0.0)
        fitting = {name: jobs[name] for name in paces}
        while fitting and sum(paces[name].least for name in fitting) > left:
            name = max(fitting, key=lambda name: paces[name].least)
            yield name, would_not_fit(fitting.pop(name), paces[name].least, left / len(jobs))
        if not fitting:
            return
        share = REHEARSED if self.plan.rehearsal else 0.0
        free = max(left - sum(paces[name].least for name in fitting), 0.0) / len(fitting)
        made: dict[str, Job] = {}
        ready: dict[str, Readied] = {}
        for name, job in fitting.items():
            if self.stop.stopped:
                return
            self.listener.run(f"{name}: {self.key}, rehearsal", 0.0)
            ready[name] = readied(
                paces[name], job, self.plan, seconds=share * free,
                allowance=paces[name].least + (1 - share) * free, stop=self.watch,
            )  # fmt: skip
            if ready[name].rehearsal is None and self.plan.rehearsal:
                ready[name] = carried_over(ready[name], [*ready.values()][:-1], ready[name].reason)
        costs = {name: at.pace or Pace(0.0, 1e-6) for name, at in ready.items()}
        if length is None:
            part = min(control.part(at.attack) for at in ready.values())
            fit = together([*costs.values()], part * max(self.watch.remaining() or 0.0, 0.0))
            least = next(iter(ready.values())).attack.fewest
            length = min(max(fit, least), *(at.fixed or LONGEST for at in ready.values()))
        for name, at in ready.items():
            made[name] = planned_for(fitting[name], at.attack.lasting(length), at, self.plan)
        expected = {name: costs[name].seconds(length) for name in made}
        for name, job in made.items():
            if self.stop.stopped:
                return
            left = max(self.watch.remaining() or 0.0, 0.0)
            if left < paces[name].least:
                yield name, would_not_fit(job, paces[name].least, left)
                continue
            allowance = SLACK * left * expected[name] / sum(expected.values())
            del expected[name]
            yield name, run_job(job, self.plan, allowance, self.out, self.listener, self.watch)


def _attacks(jobs: Mapping[str, Job]) -> list[Attack]:
    return [job.attack for job in jobs.values()]


def _battery(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The strongest attack of each kind that was scored, with its letter.

    A defense may end one kind and leave another as it was: pruning ends closed forms, and a search
    goes on. Over all targets together: one lucky photo makes no strong attack.
    """
    scored: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for run in runs:
        if run.scores is not None:
            place = (_kind(run), run.attack, run.letter)
            strength = (rank(run.verdict), run.scores.psnr.mean)
            scored.setdefault(place, []).append(strength)
    chosen: dict[str, tuple[tuple[float, float], str, str]] = {}
    for (kind, key, letter), strengths in scored.items():
        words, quality = (statistics.fmean(column) for column in zip(*strengths, strict=True))
        if kind not in chosen or (words, quality) > chosen[kind][0]:
            chosen[kind] = (words, quality), key, letter
    return [chosen[kind][1:] for kind in KINDS if kind in chosen]


KINDS = ("closed form", "active", "search")
"""How attacks answer to a defense: they solve, change the model, or search. Searches come last:
what the others leave of the time is theirs."""


def _kind(run: Run) -> str:
    if run.letter in "FGH":
        return "active"
    (attack,) = presets([run.attack], {}, published=False)
    return "search" if iterates(attack) else "closed form"


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
