"""Doctor: before compute is spent, does the set-up hang together, and what can work at all?

The harness-side check puts the true batch into the client's own computation and compares it with
the update. A residual that is not ~0 means that model, mode, sign, scale, optimizer, reduction or
order are not what they are said to be; every attack would then chase a target that does not
exist, so the culprit is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack
from leakatlas.audit.facts import facts_of
from leakatlas.audit.start import Start, can_start
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Protocol, Stage, Update, state_hash
from leakatlas.fl.draws import Draws
from leakatlas.fl.replay import simulate_client
from leakatlas.fl.state import buffers, parameters, trained
from leakatlas.threat import LETTERS
from leakatlas.vulnerability import Case, Measure, assess, words_of

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest relative residual that rounding explains, by dtype of the update."""

ADAM_TOLERANCE = 0.1
"""The same for Adam below float64: it divides by the gradient's size, so that units whose gradient
is pure rounding error move by a full step."""

ENTRIES = 100_000_000
"""Numbers that the gradients of single examples may hold together: what seconds and a gigabyte
allow."""

SPECTRAL_LEFT_OUT = (
    "Measures of the Jacobian's spectrum are left out: each takes many products with the Jacobian "
    "of the update, which is minutes where this is seconds. "
    'leakatlas.vulnerability.assess(stage, tier="spectral") takes them.'
)
"""Why the doctor stops at the forward tier."""


@dataclass(frozen=True)
class ReplayCheck:
    """Whether an update is what the described client would have sent for the true batch.

    Args:
        residual: ``|replay - update| / |update|`` under the description.
        consistent: Whether rounding explains the residual.
        culprit: ``weights``, ``mode``, ``sign``, ``scale``, ``reduction``, ``optimizer``,
            ``order``, ``defense`` or ``unknown``; empty if consistent.
        explanation: The finding in words.
    """

    residual: float
    consistent: bool
    culprit: str = ""
    explanation: str = ""


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
    """

    replay: ReplayCheck
    facts: Mapping[str, float]
    findings: tuple[str, ...]
    outlooks: Mapping[str, Start] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    left_out: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "replay": vars(self.replay).copy(),
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


def relative_residual(simulated: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> float:
    """``|simulated - observed| / |observed|`` over the observed tensors; 0/0 is 0."""
    difference = sum(float((simulated[n] - t).double().square().sum()) for n, t in observed.items())
    size = sum(float(t.double().square().sum()) for t in observed.values())
    return float((difference / size) ** 0.5) if size > 0 else float(difference > 0)


def check_replay(
    model: nn.Module,
    update: Update,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    *,
    order: Sequence[Tensor] | None = None,
    drawn: Sequence[Draws] | None = None,
    defended: bool = False,
) -> ReplayCheck:
    """Compare an update with the described client's computation on the true batch.

    Args:
        model: Holding the state at which the update is said to have been computed.
        update: The observed update.
        x: True inputs ``(N, C, H, W)``, model space.
        y: True labels ``(N,)``.
        protocol: The learning algorithm as described.
        order: Example indices of every local step, if known.
        drawn: What the model drew in every local step, if known.
        defended: Whether a defense changed the upload on purpose.
    """
    first = _residual(model, update, x, y, protocol, order, drawn)
    if first.plain <= _tolerance(update, protocol):
        return ReplayCheck(first.plain, True)
    own = {n: t for n, t in {**parameters(model), **buffers(model)}.items()}
    if update.state_hash and update.state_hash != state_hash(own):
        shared = {n: t for n, t in own.items() if n in update.tensors or n in buffers(model)}
        if update.state_hash != state_hash(shared):
            return ReplayCheck(
                first.plain,
                False,
                "weights",
                f"the update says it was computed at state {update.state_hash[:12]}, the model "
                f"holds {state_hash(own)[:12]}: capture the weights that the client received, "
                "before its first step",
            )
    if defended:
        return ReplayCheck(
            first.plain,
            False,
            "defense",
            f"the defense changes the upload by {first.plain:.1%} of its norm, as it should",
        )
    for culprit, words, residual in _hypotheses(model, update, x, y, protocol, order, drawn):
        if residual.plain <= residual.tolerance:
            return ReplayCheck(first.plain, False, culprit, words)
    for culprit, words, residual in [
        ("", "", first),
        *_hypotheses(model, update, x, y, protocol, order, drawn),
    ]:
        if residual.scaled <= residual.tolerance:
            name = "sign" if residual.factor < 0 else "scale"
            also = f", and {words}" if culprit else ""
            return ReplayCheck(
                first.plain,
                False,
                name,
                f"the update is {residual.factor:.6g} times what the described client sends: "
                + ("the sign is reversed" if residual.factor < 0 else "a factor is missing")
                + f" (learning rate, step count, clipping or weighting){also}",
            )
    return ReplayCheck(
        first.plain,
        False,
        "unknown",
        "no single change of mode, order, reduction, optimizer, sign or scale explains it; check "
        "the weights, the preprocessing of the batch, dropout, and the loss",
    )


@dataclass(frozen=True)
class _Residual:
    plain: float
    scaled: float
    factor: float
    tolerance: float


def _tolerance(update: Update, protocol: Protocol) -> float:
    dtype = next(iter(update.tensors.values())).dtype
    adam = isinstance(protocol, FedAVG) and protocol.optimizer == "adam"
    tolerance = TOLERANCE.get(dtype, 1e-3)
    return max(tolerance, ADAM_TOLERANCE) if adam and dtype != torch.float64 else tolerance


def _residual(
    model: nn.Module,
    update: Update,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    order: Sequence[Tensor] | None,
    drawn: Sequence[Draws] | None,
) -> _Residual:
    model.train(protocol.mode == "train")
    batches = order if isinstance(protocol, FedAVG) else None
    quantity = simulate_client(
        model, trained(model), buffers(model), x, y, protocol,
        batches=batches, drawn="mean" if drawn is None else drawn,
    )  # fmt: skip
    simulated = {n: t.detach() * update.sign * update.scale for n, t in quantity.items()}
    inner = sum(float((simulated[n] * t).double().sum()) for n, t in update.tensors.items())
    size = sum(float(simulated[n].double().square().sum()) for n in update.tensors)
    factor = inner / size if size > 0 else 1.0
    return _Residual(
        relative_residual(simulated, update.tensors),
        relative_residual({n: t * factor for n, t in simulated.items()}, update.tensors),
        factor,
        _tolerance(update, protocol),
    )


def _hypotheses(
    model: nn.Module,
    update: Update,
    x: Tensor,
    y: Tensor,
    protocol: Protocol,
    order: Sequence[Tensor] | None,
    drawn: Sequence[Draws] | None,
) -> Iterator[tuple[str, str, _Residual]]:
    """Single changes of the description: culprit, words, residual under the change."""
    other = "train" if protocol.mode == "eval" else "eval"
    variants: list[tuple[str, str, Protocol, Sequence[Tensor] | None]] = [
        ("mode", f"the client ran in {other} mode, not {protocol.mode}",
         _with(protocol, mode=other), order),
    ]  # fmt: skip
    if isinstance(protocol, FedSGD):
        reduced = "sum" if protocol.reduction == "mean" else "mean"
        variants.append(
            ("reduction", f"the client's loss is the {reduced}, not the {protocol.reduction}",
             _with(protocol, reduction=reduced), order)
        )  # fmt: skip
    else:
        if order is not None:
            variants.append(
                ("order", "the batches were taken in the order given, not in the recorded one",
                 protocol, None)
            )  # fmt: skip
        for change, words in (
            ({"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}, "plain SGD"),
            ({"optimizer": "sgd", "momentum": 0.9}, "SGD with momentum 0.9"),
            ({"optimizer": "adam"}, "Adam"),
        ):
            changed = _with(protocol, **change)
            if changed != protocol:
                variants.append(
                    ("optimizer", f"the client's optimizer was {words}", changed, order)
                )
    for culprit, words, variant, batches in variants:
        yield culprit, words, _residual(model, update, x, y, variant, batches, drawn)


def _with(protocol: Protocol, **changes: Any) -> Protocol:
    return replace(protocol, **changes)


def examine(
    stage: Stage,
    attacks: Sequence[Attack] = (),
    *,
    letters: Sequence[str] = (),
    captured: Update | None = None,
) -> Diagnosis:
    """Check a stage and judge every attack, in seconds.

    Args:
        stage: The set-up.
        attacks: To be judged.
        letters: Threat models to choose from, weakest first.
        captured: An update from a real client, instead of the simulated one.

    Raises:
        InvalidInput: If the captured update does not fit the model or is not finite.
    """
    federation = stage.federation
    client = federation.clients[min(federation.clients)]
    record = federation.play_round()
    target = min(federation.clients)
    model = record.received[target]
    update = captured or record.updates[target]
    update.check().check_fits(dict(model.named_parameters()))
    replay = check_replay(
        model,
        update,
        client.x,
        client.y,
        federation.protocol,
        order=None if captured else record.order[target],
        drawn=None if captured else record.draws[target],
        defended=bool(federation.defenses) and captured is None,
    )
    facts, findings = facts_of(stage, model, client.x, client.y, update)
    findings = [*(f"Note: {note}." for note in stage.notes), *findings]
    if not replay.consistent and replay.culprit != "defense":
        findings.insert(0, f"The update is not consistent with this set-up: {replay.explanation}.")
    outlooks = {attack.key: can_start(stage, attack, letters, record) for attack in attacks}
    case = Case.of_stage(stage, target=target, record=record)
    informed = best_informed(letters) if letters else case.letter
    measures, left_out = measured(replace(case, observed=update, letter=informed))
    return Diagnosis(replay, facts, tuple(findings), outlooks, measures, left_out)


def measured(case: Case) -> tuple[tuple[Measure, ...], str]:
    """The measures that take seconds, and what was left out.

    Args:
        case: One client in one round.
    """
    try:
        return assess(case, tier="forward", entries=ENTRIES), SPECTRAL_LEFT_OUT
    except UnsupportedModel as problem:
        # A model that one measure cannot look into still has its other findings.
        return (), f"No vulnerability measure was taken: {problem}"


def best_informed(letters: Sequence[str]) -> str:
    """Of the chosen threat models one that knows most, the first of equals."""
    return max(letters, key=lambda letter: len(LETTERS[letter].knowledge.names()))
