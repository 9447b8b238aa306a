"""Defenses compared: the strongest attacks again under each set, and its price in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from leakatlas.audit.jobs import Job, run_job
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, presets
from leakatlas.audit.utility import accuracy_under
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedSGD
from leakatlas.fl.view import defense_json
from leakatlas.report import Comparison, Run, rank
from leakatlas.threat import LETTERS

COMPARISON_SHARE = 0.35
"""Part of the budget that goes to comparing defenses, if any are compared."""


def compare(
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
                    if (run.setting, run.attack) == (first.name, key) and run.tried
                ][:1]  # fmt: skip
                continue
            job = Job(setting, attacks[key], letter, setting.targets[0], 1.0)
            run = run_job(job, plan, allowance, out, listener, stop)
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
