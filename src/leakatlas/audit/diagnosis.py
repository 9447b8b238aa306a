"""Doctor: before compute is spent, does the set-up hang together, and what can work at all?"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from leakatlas.attacks.api import Attack, Outlook
from leakatlas.audit.consistency import ReplayCheck, check_replay
from leakatlas.audit.facts import facts_of
from leakatlas.audit.formal import doubts
from leakatlas.audit.start import Adversaries, Start, can_start
from leakatlas.blocks.watch import MORE_TIME, Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import RoundRecord, Stage, Update
from leakatlas.fl.capture import Capture, Replayed
from leakatlas.threat import LETTERS
from leakatlas.vulnerability import Case, Measure, assess, words_of

ENTRIES = 100_000_000
"""Numbers that the gradients of single examples may hold together: what seconds and a gigabyte
allow."""

SPECTRAL_LEFT_OUT = (
    "Measures of the Jacobian's spectrum are left out: each takes many products with the Jacobian "
    "of the update, which is minutes where this is seconds. "
    'leakatlas.vulnerability.assess(stage, tier="spectral") takes them.'
)
"""Why the doctor stops at the forward tier."""


WITHOUT_IMAGES = (
    "Measures that run the private images through the model are left out: they are not at hand."
)
"""Why a capture without its images gets static measures alone."""

OUT_OF_TIME = (
    "No measure was taken: the examination's part of the budget left no time for them. leakatlas "
    "doctor takes them without one."
)

NOT_ASKED = Start(
    "",
    Outlook("unknown", "the examination's part of the budget ended before it was asked"),
    "refused",
    MORE_TIME,
)
"""An attack whose turn to be asked did not come."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Args:
        replay: The harness-side check.
        facts: Figures about model and batch, by name.
        findings: What follows from them, in words.
        outlooks: Per attack key: under which letter it starts, or why it does not.
        measures: What the update could give away, before any attack: tiers static and forward.
        left_out: Which measures were not taken, and why.
        round_seconds: What playing the clients' rounds took; no part of the record.
    """

    replay: ReplayCheck
    facts: Mapping[str, float]
    findings: tuple[str, ...]
    outlooks: Mapping[str, Start] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    left_out: str = ""
    round_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "replay": vars(self.replay) | {"expected": self.replay.expected},
            "facts": dict(self.facts),
            "findings": list(self.findings),
            "outlooks": {
                key: {
                    "letter": start.letter,
                    "verdict": start.word,
                    "reason": start.outlook.reason,
                    "wants": start.wants,
                }
                for key, start in self.outlooks.items()
            },
            "measures": [m.to_json() | words_of(m)._asdict() for m in self.measures],
            "left_out": self.left_out,
        }


def examine(
    stage: Stage,
    attacks: Sequence[Attack] = (),
    *,
    letters: Sequence[str] = (),
    captured: Capture | Update | None = None,
    watch: Watch | None = None,
) -> Diagnosis:
    """Check a stage and judge every attack, in seconds.

    Args:
        stage: The set-up; one that plays back a capture is checked against that.
        attacks: To be judged.
        letters: Threat models to choose from, weakest first.
        captured: What a real client sent, instead of the simulated one.
        watch: After the end of its time no further attack is asked; where little of it is left, no
            measure is taken.

    Raises:
        InvalidInput: If the captured update does not fit the model or is not finite.
    """
    watch, begun = watch or Watch(), time.perf_counter()
    target = min(stage.victims)
    if captured is not None:
        stage = copy.copy(stage)
        stage.play_back(Capture.of(captured), target=target)
    federation = stage.federation
    if isinstance(federation, Replayed):
        target = federation.target
    client = federation.clients[target]
    rounds = len(federation.capture.rounds) if isinstance(federation, Replayed) else 1
    playing = time.perf_counter()
    records = [federation.play_round() for _ in range(rounds)]
    took = time.perf_counter() - playing
    record = records[-1]
    model = record.received[target]
    update = record.updates[target]
    update.check().check_fits(dict(model.named_parameters()))
    # Asked before all else: where time is short, what may start shall have been asked.
    adversaries = Adversaries(stage, record)
    outlooks = {
        attack.key: NOT_ASKED if watch.over else can_start(adversaries, attack, letters)
        for attack in attacks
    }
    replay, earlier = NOT_CHECKED, []
    if stage.known and isinstance(federation, Replayed):
        *earlier, replay = [_recorded(federation, one) for one in records]
    elif stage.known:
        replay = check_replay(
            model,
            update,
            client.x,
            client.y,
            federation.protocol,
            order=record.order.get(target),
            drawn=record.draws.get(target),
            seeds=record.augmentation.get(target),
            defended=bool(federation.defenses),
            box=stage.box,
        )
    facts, findings = facts_of(stage, model, client.x, client.y, update)
    findings = [*(f"Note: {note}." for note in stage.notes), *findings]
    entries = sum(t.numel() for t in update.tensors.values())
    doubted = doubts(federation.defenses, rounds=stage.scenario.rounds, entries=entries)
    findings += [f"{one[:1].upper()}{one[1:]}." for one in doubted]
    findings += [
        f"Round {one.index} of the capture was computed on other images than the last, or "
        f"otherwise: {check.explanation} (residual {check.residual:.1e})."
        for one, check in zip(records, earlier, strict=False)
        if not check.expected
    ]
    if replay.expected and replay.culprit not in ("", "defense"):
        findings.insert(0, f"The update cannot be checked to the last digit: {replay.explanation}.")
    elif not replay.expected:
        findings.insert(0, f"The update is not consistent with this set-up: {replay.explanation}.")
    left = watch.remaining()
    if left is not None and left < time.perf_counter() - begun:  # they take about as long as all
        return Diagnosis(replay, facts, tuple(findings), outlooks, (), OUT_OF_TIME, took)
    case = Case.of_stage(stage, target=target, record=record)
    informed = best_informed(letters) if letters else case.letter
    measures, left_out = measured(replace(case, letter=informed), known=stage.known)
    return Diagnosis(replay, facts, tuple(findings), outlooks, measures, left_out, took)


NOT_CHECKED = ReplayCheck(None, True, explanation="not checked: the private batch is not at hand")
"""What can be said of a captured update without its images."""


def _recorded(federation: Replayed, record: RoundRecord) -> ReplayCheck:
    """A captured round against the images that are said to be behind it."""
    target, update = federation.target, record.updates[federation.target]
    members = [federation.clients[c] for c in record.cohort]
    if len(members) != update.clients:
        words = (
            f"not checked: the update is the mean of {update.clients} clients, and the images of "
            "only one of them are at hand"
        )
        return ReplayCheck(None, True, explanation=words)
    return check_replay(
        record.received[target],
        update,
        torch.cat([client.x for client in members]),
        torch.cat([client.y for client in members]),
        federation.protocol,
        defenses=federation.defenses,
        box=federation.box,
        clients=update.clients,
    )


def measured(case: Case, *, known: bool = True) -> tuple[tuple[Measure, ...], str]:
    """The measures that take seconds, and what was left out.

    Args:
        case: One client in one round.
        known: Whether its images are the private ones.
    """
    try:
        if not known:
            return assess(case, tier="static"), WITHOUT_IMAGES
        return assess(case, tier="forward", entries=ENTRIES), SPECTRAL_LEFT_OUT
    except UnsupportedModel as problem:
        # A model that one measure cannot look into still has its other findings.
        return (), f"No vulnerability measure was taken: {problem}"


def best_informed(letters: Sequence[str]) -> str:
    """Of the chosen threat models one that knows most, the first of equals."""
    return max(letters, key=lambda letter: len(LETTERS[letter].knowledge.names()))
