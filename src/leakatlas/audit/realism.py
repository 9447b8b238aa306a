"""The realism record of a setting, and the setting on the other side of the two verdicts.

A setting is *as deployed* if nothing but its letter and vantage informs the adversary. Its upper
bound grants what the published laboratory settings grant (labels, batch statistics, the order of
local batches, the drawn augmentation) and lets the client compute in eval mode where it trains.
A setting that was configured with such an oracle is itself the upper bound; the other side is then
the same setting without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leakatlas.attacks.api import ActiveAttack, Attack
from leakatlas.audit.deadline import Deadline
from leakatlas.audit.effort import spend
from leakatlas.audit.jobs import Job
from leakatlas.audit.listener import Listener
from leakatlas.audit.plan import Plan, Setting, presets
from leakatlas.audit.start import Adversaries, can_start
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedAVG, draws
from leakatlas.fl.losses import PLAIN
from leakatlas.models.structure import batchnorm_layers, example_input, in_mode
from leakatlas.report import Realism, Run, Side
from leakatlas.report.realism import strength
from leakatlas.threat import Grant, Vantage

ORACLES = {
    Grant.LABELS: "labels are granted, not read off the update",
    Grant.BATCH_BN: "the batch's statistics at every BN layer are granted",
    Grant.BATCH_ORDER: "the order of the local batches is granted",
    Grant.DROPOUT_MASKS: "the drawn dropout masks are granted",
    Grant.AUGMENTATION: "what the client drew to augment its images is granted",
    Grant.DEFENSE_SECRETS: "the secrets of the defenses are granted",
}
"""Grants that give away part of the answer, in words; a known pixel range is none."""

EVAL = "the client computes in eval mode (running statistics of BN, no dropout)"
SMALL = 64
"""Pixels on a side below which a resolution is called small."""


@dataclass(frozen=True)
class Pair:
    """A setting and its other side.

    Args:
        setting: As configured.
        configured: Which side that is.
        other: The other side; None if nothing separates the two, or it cannot be made.
        separates: What does, in words.
        reason: Why it cannot be made.
    """

    setting: Setting
    configured: Side
    other: Setting | None
    separates: tuple[str, ...] = ()
    reason: str = ""


def pair_of(setting: Setting, *, wanted: bool = True) -> Pair:
    """The two sides of a setting.

    Args:
        setting: As configured.
        wanted: Whether the other side shall be run.
    """
    held = [grant for grant in ORACLES if grant in setting.grants and _exists(setting, grant)]
    configured: Side = "diagnostic upper bound" if held else "as deployed"
    missing = [] if held else [grant for grant in ORACLES if _separates(setting, grant)]
    words = [ORACLES[grant] for grant in held or missing]
    protocol = setting.protocol
    calm = (
        not held
        and protocol.mode == "train"
        and setting.captured is None
        and (bool(batchnorm_layers(setting.model)) or draws_in_training(setting))
    )
    if calm:
        words.append(EVAL)
        protocol = replace(protocol, mode="eval")
    if not words:
        return Pair(setting, configured, None)
    if not wanted:
        return Pair(setting, configured, None, tuple(words), "left out (upper_bound: false)")
    if not setting.known:
        reason = "the private batch is not at hand, so there is nothing to grant"
        return Pair(setting, configured, None, tuple(words), reason)
    other = replace(
        setting,
        name=f"{'as deployed' if held else 'upper bound'}: {setting.name}",
        protocol=protocol,
        grants=setting.grants - set(held) | set(missing),
    )
    return Pair(setting, configured, other, tuple(words))


def _exists(setting: Setting, grant: Grant) -> bool:
    """Whether there is such a thing: the sum of several clients has no one batch."""
    summed = setting.effective_vantage in (Vantage.AGGREGATE, Vantage.PEER) and setting.clients > 1
    return not summed or grant in (Grant.LABELS, Grant.DEFENSE_SECRETS)


def _separates(setting: Setting, grant: Grant) -> bool:
    """Whether a client's adversary lacks this, and attacks would gain by it."""
    if not _exists(setting, grant):
        return False
    protocol = setting.protocol
    match grant:
        case Grant.LABELS:
            # One example's label stands in its gradient; whoever sees the whole head reads it.
            plain = protocol.loss == PLAIN and protocol.shared == ("*",) and not setting.defenses
            alone = len(setting.victims) // setting.clients == 1
            seen = setting.effective_vantage in (Vantage.WIRE, Vantage.SERVER)
            return not (plain and alone and seen)
        case Grant.BATCH_BN:
            return bool(batchnorm_layers(setting.model))
        case Grant.BATCH_ORDER:
            several = isinstance(protocol, FedAVG) and protocol.shuffle
            return several and setting.captured is None
        case Grant.AUGMENTATION:
            return bool(protocol.augment) and setting.captured is None
        case Grant.DROPOUT_MASKS | Grant.DEFENSE_SECRETS:
            # Eval mode has no masks; with its secrets, a defense would be none.
            return False
    raise AssertionError(grant)


def draws_in_training(setting: Setting) -> bool:
    """Whether the model's forward pass draws (dropout, stochastic depth) in train mode."""
    x = example_input(setting.model, setting.victims.images.shape[1:])
    with in_mode(setting.model, train=True):
        return draws.draws_anything(setting.model, x.repeat(2, 1, 1, 1))


def record_of(setting: Setting) -> dict[str, Any]:
    """What the laboratory held fixed, as plain JSON values."""
    protocol = setting.protocol
    examples = len(setting.victims) // setting.clients
    local: dict[str, Any] = {}
    if isinstance(protocol, FedAVG):
        local = {
            "epochs": protocol.epochs,
            "batch_size": protocol.batch_size,
            "optimizer": protocol.optimizer,
            "shuffled": protocol.shuffle,
        }
    return {
        "mode": protocol.mode,
        "batchnorm_layers": len(batchnorm_layers(setting.model)),
        "dropout": draws_in_training(setting),
        "weights": _weights(setting),
        "algorithm": type(protocol).__name__,
        "examples": examples,
        "clients": setting.clients,
        "local_steps": protocol.steps(examples),
        **local,
        "loss": protocol.loss.describe(),
        "shared": list(protocol.shared),
        "augmentation": len(protocol.augment),
        "resolution": list(setting.victims.images.shape[1:]),
        "granted": sorted(grant.value for grant in setting.grants),
        "update": "simulated" if setting.captured is None else "captured",
    }


def _weights(setting: Setting) -> str:
    if setting.weights:
        return f"loaded ({setting.weights})"
    if setting.captured is not None and setting.captured.rounds[-1].received:
        return "received by the captured client"
    if setting.model_ref.kind == "builtin":
        return "initial, never trained"
    return "as the given model holds them"


def cautions_of(setting: Setting, record: dict[str, Any]) -> tuple[str, ...]:
    """Conditions of a setting under which attacks reach more than elsewhere, in words."""
    said = []
    if record["mode"] == "eval" and (record["batchnorm_layers"] or record["dropout"]):
        said.append(
            "the client was taken to compute in eval mode; if yours trains in train mode, say so "
            "(protocol: mode: train)"
        )
    if record["weights"].startswith("initial"):
        said.append("the weights are initial ones; many attacks reach less on trained networks")
    if record["examples"] == 1:
        said.append("one image stands behind each update; larger batches are harder to take apart")
    if min(record["resolution"][1:]) < SMALL:
        height, width = record["resolution"][1:]
        said.append(f"images have {height} x {width} pixels; larger ones are harder to rebuild")
    if record["update"] == "simulated":
        said.append("the update was simulated from the description, not captured")
    return tuple(said)


def other_sides(
    pairs: Sequence[Pair],
    plan: Plan,
    runs: Sequence[Run],
    barred: Sequence[Run],
    watch: Watch,
    out: Path | None,
    listener: Listener,
    stop: Watch,
    deadline: Deadline,
) -> tuple[Realism, ...]:
    """The realism records, with the runs of the side that was not configured.

    Repeated are each setting's strongest passive and active attack, unless they left nothing to
    add, and attacks that only the other side lets start.

    Args:
        pairs: One for each setting.
        plan: The audit.
        runs: Of the settings as configured.
        barred: Those of them that could not start, whatever the budget.
        watch: The part of the budget.
        out: Folder that keeps finished runs.
        listener: Told about progress.
        stop: Ends it early.
        deadline: Of the whole audit.
    """
    made: dict[str, list[Run]] = {}
    spent = watch.over  # asking what may start takes time as well
    # An attack keeps what was rehearsed for it: all its time goes to the victim. Without oracles it
    # has labels to read, which only a rehearsal teaches it.
    blind = any(pair.configured != "as deployed" for pair in pairs if pair.other is not None)
    with deadline.ends():
        jobs: list[Job] = []
        for pair in pairs:
            if pair.other is not None and not stop.stopped and not spent:
                mine = [run for run in runs if run.setting == pair.setting.name]
                idle = {run.attack for run in barred if run.setting == pair.setting.name}
                jobs += _jobs(pair, pair.other, plan, mine, sorted(idle))
        again = replace(plan, rehearsal=plan.rehearsal and blind)
        for run in spend(jobs, again, watch, out, listener, stop):
            made.setdefault(run.setting, []).append(run)
            listener.done(run)
    silent = STOPPED if stop.stopped else OVER if watch.over else NOTHING_TO_ADD
    return tuple(
        realism_of(pair, made.get(pair.other.name, []) if pair.other else [], silent)
        for pair in pairs
    )


def realism_of(pair: Pair, runs: Sequence[Run] = (), silent: str = "") -> Realism:
    """The record of a setting.

    Args:
        pair: With its other side.
        runs: On the other side.
        silent: Why there are none, where no run says it.
    """
    record = record_of(pair.setting)
    reason = pair.reason
    if pair.other is not None and not any(run.tried for run in runs):
        reason = next((run.reason for run in runs if run.reason), silent)
    return Realism(
        setting=pair.setting.name,
        record=record,
        cautions=cautions_of(pair.setting, record),
        configured=pair.configured,
        separates=pair.separates,
        runs=tuple(runs),
        reason=reason,
    )


NOT_YET = "the audit has not come to it"
STOPPED = "the audit was stopped before it"
OVER = "the budget ended before it"
NOTHING_TO_ADD = (
    "no attack was left to repeat: none ran, or those that did brought out every image exactly"
)


def _jobs(
    pair: Pair, other: Setting, plan: Plan, runs: Sequence[Run], idle: Sequence[str]
) -> list[Job]:
    """What is run on the other side of a setting."""
    published = plan.seconds is None
    chosen: list[tuple[Attack, str]] = []
    for run in (*_best(runs, active=False), *_best(runs, active=True)):
        (attack,) = presets([run.attack], plan.attack_parameters, published=published)
        if pair.configured == "as deployed":
            attack = _as_it_ran(run, attack, plan)
        chosen.append((attack, run.letter))
    if idle and not other.hides_updates:  # a round behind masks may take minutes
        live = other.stage(letter=plan.letters[0], seed=plan.seed)
        adversaries = Adversaries(live, live.federation.play_round())
        for attack in presets(idle, plan.attack_parameters, published=published):
            start = can_start(adversaries, attack, plan.letters)
            if start.obstacle is None:
                chosen.append((attack, start.letter))
    return [
        Job(other, attack, letter, target)
        for attack, letter in chosen
        for target in (other.targets[:1] if isinstance(attack, ActiveAttack) else other.targets)
    ]


def _as_it_ran(run: Run, preset: Attack, plan: Plan) -> Attack:
    """An attack with the parameters that it ran with, but for labels that it had to read."""
    parameters = dict(run.recipe["attack"]["parameters"])
    if "labels" in parameters and "labels" not in plan.attack_parameters.get(run.attack, {}):
        parameters["labels"] = preset.to_json()["labels"]
    return type(preset).from_json(parameters)


def _best(runs: Sequence[Run], *, active: bool) -> list[Run]:
    """The strongest run of a kind of attack, if it left anything to add."""
    kind = [run for run in runs if run.scores is not None and (run.letter in "FGH") == active]
    if not kind:
        return []
    best = max(kind, key=strength)
    assert best.scores is not None
    exact = best.scores.success["exact"]
    return [] if exact.successes == exact.trials else [best]
