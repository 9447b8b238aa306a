"""Audit: which private images come out of an FL update, for whom, and what stops it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from leakatlas import devices
from leakatlas.audit.bounds import require_feasible
from leakatlas.audit.config import AuditConfig, as_context, make_plan, read_config
from leakatlas.audit.consistency import ReplayCheck, check_replay
from leakatlas.audit.diagnosis import Diagnosis, examine
from leakatlas.audit.listener import Listener, Silent
from leakatlas.audit.plan import Plan, Setting, parse_execution, presets, stand_in
from leakatlas.audit.run import carry_out
from leakatlas.bench.harness import Trial, run_trial
from leakatlas.blocks.watch import Execution, Watch, parse_budget
from leakatlas.data import Batch, Box, as_images
from leakatlas.data.stacks import Classes
from leakatlas.errors import InvalidInput
from leakatlas.fl import Defense, FedSGD, ModelRef, Protocol, Update
from leakatlas.fl.capture import Capture
from leakatlas.fl.intake import Selector
from leakatlas.report import (
    VERDICTS,
    Comparison,
    Context,
    Gate,
    LetterVerdict,
    Report,
    Run,
    parse_gate,
)
from leakatlas.threat import Grant, Vantage, threat_models

__all__ = [
    "VERDICTS",
    "AuditConfig",
    "Comparison",
    "Diagnosis",
    "Gate",
    "LetterVerdict",
    "Listener",
    "Plan",
    "ReplayCheck",
    "Report",
    "Run",
    "Setting",
    "Silent",
    "Trial",
    "Watch",
    "audit",
    "carry_out",
    "check_replay",
    "doctor",
    "examine",
    "make_plan",
    "parse_budget",
    "parse_execution",
    "parse_gate",
    "presets",
    "read_config",
    "require_feasible",
    "run_trial",
]


def audit(
    model: nn.Module,
    batch: Batch | None = None,
    *,
    captured: Capture | Update | None = None,
    input_shape: tuple[int, int, int] | None = None,
    protocol: Protocol | None = None,
    defenses: Sequence[Defense] = (),
    alternatives: Mapping[str, Sequence[Defense]] | None = None,
    threat: str = "A-H",
    vantage: Vantage | str = Vantage.SERVER,
    grants: Iterable[Grant | str] = (),
    clients: int = 1,
    box: Box | None = None,
    output: Selector | None = None,
    surrogate: Batch | None = None,
    channels: Literal[1, 3] | None = None,
    classes: Classes | None = None,
    attacks: Sequence[str] | None = None,
    attack_parameters: Mapping[str, Mapping[str, Any]] | None = None,
    budget: str | float | None = "5m",
    seed: int = 0,
    execution: Execution = "auto",
    rehearsal: bool = True,
    upper_bound: bool = True,
    context: Context | Mapping[str, Any] | None = None,
    in_process: bool = False,
    out: Path | str | None = None,
    listener: Listener | None = None,
    stop: Watch | None = None,
    device: str | torch.device = "auto",
) -> Report:
    """Attack one's own model, data and protocol, and say what came out.

    Args:
        model: Image classifier ``(N, C, H, W) -> (N, K)`` with the weights that a client would
            receive; it is not changed.
        batch: Private images in [0, 1] and labels ``(N,)``, or targets ``(N, K)`` of the
            protocol's loss, in any form that :func:`leakatlas.data.as_images` reads; dealt evenly
            to the clients. With ``captured``, the images behind it, or None where they are not at
            hand: then nothing is scored.
        captured: What a real client sent, attacked instead of a simulated round; the model holds
            the state that it received, unless the capture does.
        input_shape: ``(C, H, W)``, needed where there is no batch.
        protocol: FedSGD or FedAVG, with the client's loss and what it shares; FedSGD if None.
        defenses: In force.
        alternatives: Other sets of defenses to compare with.
        threat: Letters, such as ``"A-E"``.
        vantage: Where the adversary looks.
        grants: Facts given on top; recorded in the report.
        clients: Number of clients.
        box: Normalisation between [0, 1] and the model's inputs; none if None.
        output: Which part of the model's output holds the logits (place, key or attribute).
        surrogate: Public images of the same kind, for D, E, G and H, as a batch may come.
        channels: 3 gives grey images three equal channels, 1 makes colour ones grey.
        classes: Names of the classes in the order of their labels, or label by name.
        attacks: Keys; every implemented one if None.
        attack_parameters: Changes to the presets, by key.
        budget: ``"30s"``, seconds, or ``"paper"`` for the published presets without a limit.
        seed: Of everything random.
        execution: ``"auto"`` tries faster ways to compute slopes where that repays, ``"eager"``
            repeats a long run bit for bit.
        rehearsal: Whether the adversary first chooses variants and order on public images, within
            the budget; not for published presets, which have none.
        upper_bound: Whether the strongest attacks run once more with oracles, within the budget,
            for the second of the two verdicts (:meth:`leakatlas.report.Report.standings`).
        context: For the first page of the report; the keys of :class:`leakatlas.report.Context`.
        in_process: Whether attacks run in this process, where they could read the images: a
            debugging aid, which the recipe names.
        out: Keeps finished runs and checkpoints, so that a killed audit resumes.
        listener: Shown progress.
        stop: Its ``stop()`` ends the audit early and keeps what was computed.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Raises:
        InvalidInput: If the images do not fit the model, or this machine lacks the device.
        UnknownName: If a letter, grant or attack does not exist.
        InvalidParameter: If a parameter is outside its range.
    """
    setting = _setting(
        model, batch, protocol, defenses, clients, box, output, surrogate, vantage, grants,
        captured, input_shape, device, channels, classes,
    )  # fmt: skip
    if attacks is not None:
        setting = replace(setting, attacks=tuple(attacks))
    plan = Plan(
        settings=(setting,),
        letters=tuple(m.letter for m in threat_models(threat)),
        alternatives={n: tuple(d) for n, d in (alternatives or {}).items()},
        attack_parameters=attack_parameters or {},
        seconds=parse_budget(budget),
        seed=seed,
        execution=execution,
        rehearsal=rehearsal,
        upper_bound=upper_bound,
        context=as_context(context),
        in_process=in_process,
        command="leakatlas.audit(model, batch, ...)",
    )
    return carry_out(plan, out=None if out is None else Path(out), listener=listener, stop=stop)


def doctor(
    model: nn.Module,
    batch: Batch | None = None,
    *,
    captured: Capture | Update | None = None,
    input_shape: tuple[int, int, int] | None = None,
    protocol: Protocol | None = None,
    defenses: Sequence[Defense] = (),
    threat: str = "A-H",
    vantage: Vantage | str = Vantage.SERVER,
    grants: Iterable[Grant | str] = (),
    clients: int = 1,
    box: Box | None = None,
    output: Selector | None = None,
    surrogate: Batch | None = None,
    channels: Literal[1, 3] | None = None,
    classes: Classes | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> Diagnosis:
    """Check a set-up in seconds: is it consistent, and which attacks can work at all?

    Args:
        model: As for :func:`audit`; with ``captured``, holding the state that the client received.
        batch: As for :func:`audit`; with ``captured``, the batch behind it.
        captured: As for :func:`audit`.
        input_shape: As for :func:`audit`.
        protocol: As for :func:`audit`.
        defenses: As for :func:`audit`.
        threat: As for :func:`audit`.
        vantage: As for :func:`audit`.
        grants: As for :func:`audit`.
        clients: As for :func:`audit`.
        box: As for :func:`audit`.
        output: As for :func:`audit`.
        surrogate: As for :func:`audit`.
        channels: As for :func:`audit`.
        classes: As for :func:`audit`.
        seed: Of everything random.
        device: As for :func:`audit`.
    """
    setting = _setting(
        model, batch, protocol, defenses, clients, box, output, surrogate, vantage, grants,
        captured, input_shape, device, channels, classes,
    )  # fmt: skip
    letters = tuple(m.letter for m in threat_models(threat))
    stage = setting.readable().stage(letter=letters[0], seed=seed)
    attacks = presets(None, {}, published=False)
    require_feasible(stage, attacks, None)
    return examine(stage, attacks, letters=letters)


def _setting(
    model: nn.Module,
    batch: Batch | None,
    protocol: Protocol | None,
    defenses: Sequence[Defense],
    clients: int,
    box: Box | None,
    output: Selector | None,
    surrogate: Batch | None,
    vantage: Vantage | str,
    grants: Iterable[Grant | str],
    captured: Capture | Update | None,
    input_shape: tuple[int, int, int] | None,
    device: str | torch.device,
    channels: Literal[1, 3] | None,
    classes: Classes | None,
) -> Setting:
    _require_kinds(model, captured)
    capture = None if captured is None else Capture.of(captured)
    known = batch is not None
    if batch is None:
        batch = stand_in(capture, input_shape)
    protocol = protocol or FedSGD()
    vectors = protocol.loss.multilabel or protocol.loss.key == "python"
    taken: dict[str, Any] = {"box": box, "vectors": vectors, "channels": channels}
    victims = as_images(batch, name="batch", classes=classes, **taken)
    public = None if surrogate is None else as_images(surrogate, name="surrogate", **taken)
    return Setting(
        name=f"{type(model).__name__}, {type(protocol).__name__}",
        model=model,
        model_ref=ModelRef("object", type(model).__name__, output=output),
        victims=victims,
        protocol=protocol,
        clients=clients,
        defenses=tuple(defenses),
        box=box or Box.unit(victims.channels),
        surrogate=public,
        vantage=Vantage(vantage),
        captured=capture,
        known=known,
        grants=frozenset(Grant(grant) for grant in grants),
        device=devices.chosen(device),
    )


def _require_kinds(model: object, captured: object) -> None:
    """Refuse what no type checker saw, in words."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"model: expected a torch.nn.Module with its weights, got {type(model).__name__}. "
            "leakatlas.models.build(name) makes one of ours; a YAML file names any (model:)."
        )
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise InvalidInput(
            f"The model {type(model).__name__} lies on the meta device, where weights have shapes "
            "and no values; load them first."
        )
    if not isinstance(captured, Capture | Update | None):
        raise InvalidInput(
            f"captured: expected an Update or a Capture, got {type(captured).__name__}. "
            "Update.from_gradients, .from_arrays and .from_state_dicts make one of what clients "
            "send."
        )


class _CallableRoom(types.ModuleType):
    """Lets ``leakatlas.audit(model, batch)`` work although ``leakatlas.audit`` is this package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return audit(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
