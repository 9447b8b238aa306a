"""Defenses compared: the strongest attacks again under each set, and its price in accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from leakatlas.audit.effort import REHEARSED, SLACK, Readied, iterates, labelled, readied
from leakatlas.audit.jobs import Job, finished, run_job
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting, presets
from leakatlas.audit.utility import Utility, price_of
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedSGD
from leakatlas.fl.view import defense_json
from leakatlas.report import Comparison, Run, rank
from leakatlas.threat import LETTERS

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
    """
    if not plan.alternatives:
        return []
    first = plan.settings[0]
    battery = [
        (key, _informed(letter, plan.letters))
        for key, letter in _battery([run for run in runs if run.setting == first.name])
    ]
    cases = {"as configured": first.defenses, **plan.alternatives}
    settings = {
        name: replace(first, defenses=defenses, targets=first.targets[:1])
        for name, defenses in cases.items()
    }
    prices = _prices(plan, settings, watch, stop)
    found: dict[str, list[Run]] = {name: [] for name in cases}
    for position, (key, letter) in enumerate(battery):
        left = watch.remaining()
        seconds = None if left is None else max(left, 1.0) / (len(battery) - position)
        for name, run in _duel(plan, settings, key, letter, seconds, out, listener, stop):
            found[name].append(run)
            listener.done(run)
    return [
        Comparison(
            name,
            tuple(defense_json(d) for d in cases[name]),
            tuple(found[name]),
            prices[name].accuracy,
            prices[name].reason,
        )
        for name in cases
        if found[name] or not stop.stopped
    ]


def _prices(
    plan: Plan, settings: Mapping[str, Setting], watch: Watch, stop: Watch
) -> dict[str, Utility]:
    """Accuracy under each set, by name."""
    left = watch.remaining()
    allowed = Watch(None if left is None else max(MEASURING * left, 1.0), parent=stop)
    prices: dict[str, Utility] = {}
    for (name, setting), share in zip(settings.items(), allowed.share(len(settings)), strict=False):
        local = not isinstance(setting.protocol, FedSGD)
        prices[name] = price_of(setting.defenses, local=local, seed=plan.seed, watch=share)
    missing = Utility(None, "the budget ended before its price was measured")
    return {name: prices.get(name, missing) for name in settings}


def _duel(
    plan: Plan,
    settings: Mapping[str, Setting],
    key: str,
    letter: str,
    seconds: float | None,
    out: Path | None,
    listener: Listener,
    stop: Watch,
) -> Iterator[tuple[str, Run]]:
    """One attack against every set of defenses, with equal effort."""
    published = plan.seconds is None
    (attack,) = presets([key], plan.attack_parameters, published=published)
    jobs = {name: Job(setting, attack, letter, setting.targets[0], 1.0)
            for name, setting in settings.items()}  # fmt: skip
    each = None if seconds is None else seconds / len(jobs)
    if each is not None and iterates(attack):
        share = REHEARSED if plan.rehearsal else 0.0
        kept = {name: finished(job, plan, out) for name, job in jobs.items()}
        ready: dict[str, Readied] = {}
        for name, job in jobs.items():
            if kept[name] is not None or stop.stopped:
                continue
            listener.run(f"{name}: {key}, rehearsal", 0.0)
            ready[name] = readied(
                job, plan, seconds=share * each, allowance=(1 - share) * each, stop=stop
            )
        lengths = [at.lasting((1 - share) * each).length or 1 for at in ready.values()]
        for name, at in ready.items():
            jobs[name] = replace(
                jobs[name],
                attack=labelled(at.attack.lasting(min(lengths)), at, jobs[name], plan),
                preset=attack,
                rehearsal=at.told(),
            )
    for name, job in jobs.items():
        if stop.stopped:
            return
        allowance = each if each is None or job.preset is None else SLACK * each
        yield name, run_job(job, plan, allowance, out, listener, stop)


def _battery(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The strongest passive and the strongest active attack that leaked, with their letters."""
    chosen: dict[bool, Run] = {}
    for run in runs:
        if run.scores is None:
            continue
        active = run.letter in "FGH"
        strength = (rank(run.verdict), run.scores.psnr.mean)
        held = chosen.get(active)
        if held is None or held.scores is None or strength > (
            rank(held.verdict), held.scores.psnr.mean,
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
