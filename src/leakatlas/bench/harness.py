"""Where both sides meet: plays the rounds, hands the view to the attack, keeps the truth."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from leakatlas.attacks.api import CUT, ActiveAttack, Attack, Reconstruction, Tampering
from leakatlas.bench.adversary import Adversary, Here, Request
from leakatlas.bench.strangers import require_strangers
from leakatlas.bench.task import code_of
from leakatlas.blocks.watch import MORE_TIME, Trail, Watch
from leakatlas.errors import InvalidInput, NotGranted, ProtocolError, Unavailable
from leakatlas.fl import Federation, RoundRecord, Stage, TamperedModel, Truth, View
from leakatlas.metrics import assign, pairwise_mse, psnr_of_mse
from leakatlas.metrics.score import Scores, score
from leakatlas.threat import Knowledge, Vantage

SYBIL_IDS = 1_000_000
"""Ids from here on are devices of the adversary."""

MOST_ROUNDS = 1_000
"""An active attack that still asks for more rounds by then is stopped with an error."""


@dataclass(frozen=True)
class Trial:
    """One attack on one stage.

    Args:
        view: What the adversary held.
        truth: What it was after; at an aggregate vantage, every client's batch.
        records: The rounds, private facts included.
        found: What the attack returned; images in the model's input space.
        images: The candidates mapped to [0, 1], not clipped.
    """

    view: View
    truth: Truth
    records: tuple[RoundRecord, ...]
    found: Reconstruction
    images: torch.Tensor


def observe(
    stage: Stage,
    attack: Attack,
    *,
    target: int = 0,
    seed: int = 0,
    watch: Watch | None = None,
    adversary: Adversary | None = None,
    lean: bool = False,
) -> tuple[View, tuple[RoundRecord, ...]]:
    """Play the rounds that ``attack`` watches or tampers with.

    Args:
        stage: The set-up.
        attack: The attack.
        target: The client under attack.
        seed: Of the attack.
        watch: Budget.
        adversary: Who tampers; this process if None.
        lean: Whether only the sum of a round is kept (:mod:`leakatlas.bench.lean`).

    Raises:
        NotGranted: If the scenario does not let this adversary tamper or select.
        ProtocolError: If a client refuses, or the attack never stops asking for rounds.
        AttackCrashed: If the adversary's process ended.
        Unavailable: If a tampered round would outlast the budget, as far as is known.
    """
    adversary = adversary or Here()
    watch = watch or Watch()
    records: list[RoundRecord] = []
    federation = stage.federation
    if not isinstance(attack, ActiveAttack):
        for number in range(stage.scenario.rounds):
            last = number == stage.scenario.rounds - 1
            begun = time.perf_counter()
            if lean:
                records.append(_lean(federation, None))
                continue
            records.append(federation.play_round(apply=not last))
            learn(federation, records[-1], begun)
        return stage.view(records, target=target, others=attack.watches_others), tuple(records)
    view = stage.view(target=target)
    attack.check(view)
    reads: frozenset[str] = frozenset()
    keys: list[dict[str, torch.Tensor]] = []
    draws: torch.Tensor | None = None
    code = _travelling(stage, adversary)
    while True:
        turn = adversary.tamper(
            Request(
                attack=attack, view=view, seed=seed, watch=watch, code=code,
                turn=len(records), draws=draws,
            )
        )  # fmt: skip
        reads |= turn.reads
        if turn.cut_short:
            watch.cut()
        if turn.planned is not None:
            watch.shortened(*turn.planned)
        draws, tampering = turn.draws, turn.tampering
        if tampering is None:
            view.remember(reads)
            return view, tuple(records)
        if len(records) == MOST_ROUNDS:
            raise ProtocolError(f"{attack.key} asked for more than {MOST_ROUNDS} rounds.")
        tampering = tampering.copy()  # even in one process, only data reaches the clients
        selects = tampering.cohort is not None or tampering.sybils > 0
        if selects and not view.knowledge & Knowledge.SELECTION:
            raise NotGranted(
                f"{attack.key} chooses the cohort, which {view.describe()} may not; it takes H."
            )
        if lean:
            if selects:
                raise InvalidInput(f"{attack.key} chooses a cohort; a lean round has all.")
            records.append(_lean(federation, tampering.sent))
        else:
            _afford(stage, tampering, watch)
            begun = time.perf_counter()
            records.append(
                federation.play_round(
                    cohort=tampering.cohort,
                    sent=tampering.sent,
                    sybils=range(SYBIL_IDS, SYBIL_IDS + tampering.sybils),
                )
            )
            learn(federation, records[-1], begun)
        keys.append(dict(tampering.key))
        view = stage.view(records, target=target, keys=keys, others=attack.watches_others)


def _lean(
    federation: Federation, sent: TamperedModel | Mapping[int, TamperedModel] | None
) -> RoundRecord:
    from leakatlas.bench.lean import play_round  # few rounds need secure aggregation at hand

    return play_round(federation, sent)


_COSTS: dict[tuple[object, ...], float] = {}
"""Least seconds that a round took for each unit of its size, by defenses and number of clients."""

LONG_ROUND = 3.0
"""Seconds from which a round is too long to be begun beyond the budget; shorter ones are the
overhead of any run."""


def _case(federation: Federation, clients: int) -> tuple[object, ...]:
    return tuple(defense.key for defense in federation.defenses), clients


def learn(federation: Federation, record: RoundRecord, begun: float) -> None:
    """Note what a round cost."""
    size = _size(federation, next(iter(record.received.values())))
    spent = time.perf_counter() - begun
    case = _case(federation, len(record.cohort))
    _COSTS[case] = min(spent / max(size, 1), _COSTS.get(case, math.inf))


def _size(federation: Federation, model: nn.Module) -> float:
    """What a client's round grows with: parameters, or gradients where a defense takes many."""
    work = sum(defense.workload(model) - 1 for defense in federation.defenses)
    return work or float(sum(parameter.numel() for parameter in model.parameters()))


def _afford(stage: Stage, tampering: Tampering, watch: Watch) -> None:
    """Refuse a round that would outlast the budget: nobody can end it half-way.

    Simulated clients mask every parameter for every other client, so that a model which was blown
    up a hundredfold takes minutes where the agreed one takes a second.

    Raises:
        Unavailable: With the time that it would take.
    """
    left = watch.remaining()
    federation = stage.federation
    clients = len(tampering.cohort or federation.clients) + tampering.sybils
    cost = _COSTS.get(_case(federation, clients))
    if left is None or cost is None:
        return
    sent = tampering.sent
    one = next(iter(sent.values())) if isinstance(sent, Mapping) else sent
    built = one.build(federation.model, pixels=math.prod(stage.input_shape))
    size = _size(federation, built)
    if cost * size > max(left, LONG_ROUND):
        raise Unavailable(
            f"Would not fit: a round of {clients} clients with such a model takes about "
            f"{cost * size:.0f} s here, and {max(left, 0.0):.0f} s are left; {MORE_TIME}."
        )


def run_trial(
    stage: Stage,
    attack: Attack,
    *,
    target: int = 0,
    seed: int = 0,
    watch: Watch | None = None,
    adversary: Adversary | None = None,
    lean: bool = False,
    played: tuple[RoundRecord, ...] | None = None,
) -> Trial:
    """Observe, attack, and map the candidates back to pixels.

    The budget of ``watch`` holds for preparing and tampering, and once more for the attack itself,
    within those above it; the rounds are the clients' time, not the adversary's. Arguments as of
    :func:`observe`.

    Args:
        stage: As there.
        attack: As there.
        target: As there.
        seed: As there.
        watch: As there.
        adversary: As there.
        lean: As there.
        played: Rounds of this stage's honest clients that were played before, for a passive attack.

    Raises:
        InvalidInput: If a victim is among the images that the attack's prior was trained on.
    """
    require_strangers(stage, attack)
    adversary = adversary or Here()
    watch = watch or Watch()
    if played is not None and not isinstance(attack, ActiveAttack):
        view, records = stage.view(played, target=target, others=attack.watches_others), played
    else:
        view, records = observe(
            stage, attack, target=target, seed=seed, watch=watch, adversary=adversary, lean=lean
        )
    own, code = watch.again(), _travelling(stage, adversary)
    found = adversary.attack(Request(attack=attack, view=view, seed=seed, watch=own, code=code))
    found = replace(found.on_cpu(), recipe=attack.recipe(seed, stage.scenario.to_json()))
    if found.status == "complete" and own.cut_short:  # while it prepared its tampering
        found = replace(found, status="cut short", reason=CUT)
    if own.planned is not None:
        made, asked = own.planned
        notes = {"iterations_made": float(made), "iterations_asked": float(asked)}
        found = replace(found, notes={**found.notes, **notes})
    truth = truth_of(stage, target, records)
    return Trial(view, truth, records, found, stage.box.denormalize(found.images))


def _travelling(stage: Stage, adversary: Adversary) -> bytes | None:
    """A user's own model and loss, if they have to reach another process."""
    return code_of(stage) if adversary.process == "own" else None


def truth_of(stage: Stage, target: int, records: Sequence[RoundRecord] = ()) -> Truth:
    """What is at stake: one client's batch, or everybody's where only the sum is seen."""
    members = len(stage.federation.clients)
    if records:
        members = len([c for c in records[-1].cohort if c not in records[-1].sybils])
    pooled = stage.scenario.vantage is Vantage.AGGREGATE and members > 1
    return stage.pooled_truth() if pooled else stage.truth(target)


def scored(
    trial: Trial,
    stage: Stage,
    *,
    public: tuple[torch.Tensor, torch.Tensor | None],
    other_batch: torch.Tensor | None = None,
) -> Scores:
    """The scores of a trial, null baselines included.

    Args:
        trial: The trial.
        stage: Its stage.
        public: Public images in the victims' shape, and their labels, for the null baselines.
        other_batch: What the attack found on another batch (:func:`control_trial`).
    """
    found = trial.found
    labels = found.labels
    if labels is None and found.label_counts is not None:
        labels = torch.repeat_interleave(
            torch.arange(len(found.label_counts)), found.label_counts.long()
        )
    oracle = "labels" in found.reads  # what was given was not recovered
    return _scored(
        trial.truth, stage, trial.images, public, None if oracle else labels, other_batch
    )


def nothing_scored(
    truth: Truth, stage: Stage, *, public: tuple[torch.Tensor, torch.Tensor | None]
) -> Scores:
    """The scores of an attack that gave nothing back: every original is a failure."""
    return _scored(truth, stage, None, public, None, None)


def _scored(
    truth: Truth,
    stage: Stage,
    images: torch.Tensor | None,
    public: tuple[torch.Tensor, torch.Tensor | None],
    labels: torch.Tensor | None,
    other_batch: torch.Tensor | None,
) -> Scores:
    like = truth.images if images is None else images
    return score(
        images if images is not None and len(images) else None,
        truth.images.to(like.dtype),
        public=public[0].to(like.dtype),
        labels=truth.labels,
        recovered_labels=labels,
        classes=stage.classes,
        public_labels=public[1],
        baselines=None if other_batch is None else {"other_batch": other_batch.to(like.dtype)},
    )


def trace(trial: Trial, trail: Trail, stage: Stage) -> tuple[tuple[float, float], ...]:
    """CPU seconds, and mean PSNR in dB of the best iterate by then; empty where none was kept.

    Iterates are clipped and assigned one to one, as candidates are.
    """
    truth, found = trial.truth.images.double(), []
    for seconds, x in trail.points:
        images = stage.box.denormalize(x).double().clamp(0, 1)
        if len(images) == len(truth) and bool(torch.isfinite(images).all()):
            cost = pairwise_mse(images, truth)
            own = [candidate for candidate in assign(cost).of_original if candidate is not None]
            found.append((seconds, float(psnr_of_mse(cost[own, range(len(truth))]).mean())))
    return tuple(found)


def control_trial(
    stage: Stage,
    decoy: Stage,
    attack: Attack,
    *,
    target: int = 0,
    seed: int = 0,
    watch: Watch | None = None,
    adversary: Adversary | None = None,
) -> Trial:
    """The null baseline of an attack: run on the update of *another* batch, held against this one.

    What it scores is owed to the attack's prior and to the matching of candidates, not to the
    victim's update; :func:`~leakatlas.metrics.score` takes its images as ``other_batch``.

    Args:
        stage: The set-up under attack; its clients compute nothing here.
        decoy: The same set-up, with other images under the same labels.
        attack: With the budget of the real trial.
        target: As in the real trial.
        seed: As in the real trial.
        watch: With the budget of the real trial.
        adversary: Who attacks; this process if None.

    Returns:
        The decoy's trial, with the truth of ``stage``.

    Raises:
        InvalidInput: If the decoy's images have other shapes or labels, or one of them is the
            victim's.
    """
    for client in stage.victims:
        real, other = stage.victims[client], decoy.victims.get(client)
        if other is None or other.images.shape != real.images.shape:
            raise InvalidInput(
                f"control_trial: client {client} needs a decoy batch of shape "
                f"{tuple(real.images.shape)}, got "
                f"{None if other is None else tuple(other.images.shape)}."
            )
        if not torch.equal(other.labels, real.labels):
            raise InvalidInput(
                f"control_trial: client {client}'s decoy batch must have the labels "
                f"{real.labels.tolist()}, got {other.labels.tolist()}."
            )
        if any(torch.equal(a, b) for a in other.images for b in real.images):
            raise InvalidInput(
                f"control_trial: client {client}'s decoy batch holds an image of the real one, so "
                "it is no null baseline."
            )
    trial = run_trial(decoy, attack, target=target, seed=seed, watch=watch, adversary=adversary)
    pooled = len(trial.truth.images) != len(stage.truth(target).images)
    return replace(trial, truth=stage.pooled_truth() if pooled else stage.truth(target))
