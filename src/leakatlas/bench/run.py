"""One cell: play, attack, score; what comes of it is a record, whatever happens."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack
from leakatlas.bench import (
    course,
    examine,
    harness,
    labelling,
    looks,
    machine,
    picture,
    scene,
    utility,
)
from leakatlas.bench import own as own_code
from leakatlas.bench.adversary import Adversary, Dead
from leakatlas.bench.cells import Cell
from leakatlas.bench.measures import BINS
from leakatlas.bench.record import Record, Status
from leakatlas.bench.schema import REHEARSED, OwnMeasure
from leakatlas.blocks.watch import Conduct, Trail, Watch, parse_budget
from leakatlas.errors import AttackCrashed, LeakAtlasError, Unavailable
from leakatlas.fl import Stage


def run_cell(cell: Cell, adversary: Adversary, *, watch: Watch | None = None) -> Record:
    """Run a cell.

    Args:
        cell: Which.
        adversary: Who attacks.
        watch: Told about progress; stopping it cuts the attack short.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    torch.set_num_threads(cell.threads)
    facts: dict[str, Any] = {
        "cell": cell.name, "code": cell.code_hash, "study": cell.study, "label": cell.label,
        "seed": cell.seed, "batch": cell.batch, "recipe": cell.recipe, "started": started,
        "machine": machine.facts(cell.device), "process": adversary.process,
    }  # fmt: skip
    begun = time.perf_counter()
    try:
        if cell.case.attack is None:
            cpu = time.process_time()
            own = _checked(cell, _without_attack(cell)(cell))
            costs = {
                "seconds": time.perf_counter() - begun,
                "cpu_seconds": time.process_time() - cpu,
            }
            return Record(**facts, status="complete", own=own, costs=costs)
        stage = scene.staged(cell)
    except own_code.StudyFault as fault:
        return Record(**facts, status="error", reason=str(fault))
    except LeakAtlasError as refusal:
        return Record(**facts, status=_kind(refusal), reason=f"{type(refusal).__name__}: {refusal}")
    return _attacked(cell, stage, adversary, watch or Watch(), facts)


def _kind(refusal: LeakAtlasError) -> Status:
    """Refused for good; an error, to be tried again, where this machine lacks what another has."""
    return "error" if isinstance(refusal, Unavailable) else "refused"


def nothing_came(cell: Cell, reason: str) -> Record:
    """The record of a cell whose process died: an error, and every original is a failure."""
    return run_cell(cell, Dead(reason))


def _attacked(
    cell: Cell, stage: Stage, adversary: Adversary, watch: Watch, facts: dict[str, Any]
) -> Record:
    case = cell.case
    truth = harness.truth_of(stage, case.target)
    own: dict[str, Any] = {}
    trial: harness.Trial | None = None
    other: Tensor | None = None
    costs: Mapping[str, float] | None = None
    seconds = parse_budget(case.budget)

    trail = Trail()

    def budget(trail: Trail | None = None) -> Watch:
        conduct = Conduct(execution=case.execution, trail=trail)
        return Watch(seconds, watch.listen, parent=watch, conduct=conduct)

    status: Status
    try:
        assert case.attack is not None
        chosen = case.attack.preset == REHEARSED
        attack = _own(cell, "choose")(cell) if chosen else scene.attack_of(case)
        trial = harness.run_trial(
            stage, attack, target=case.target, seed=cell.seed, watch=budget(trail),
            adversary=adversary, lean=case.lean,
        )  # fmt: skip
        truth = trial.truth
        status, reason = trial.found.status, trial.found.reason
        costs = dict(adversary.costs())  # before the control has costs of its own
        if case.control:
            decoy = harness.control_trial(
                stage, scene.staged(cell, decoy=True), attack, target=case.target,
                seed=cell.seed, watch=budget(), adversary=adversary,
            )  # fmt: skip
            other = decoy.images
    except AttackCrashed as crash:
        status, reason = "error", str(crash)
    except LeakAtlasError as refusal:
        status, reason = _kind(refusal), f"{type(refusal).__name__}: {refusal}"
    if trial is not None:
        try:
            if any(m in BINS for m in case.measures if isinstance(m, str)):
                own |= examine.bins(trial, case.batch)
            own |= _looked(cell, trial, stage, attack)
        except LeakAtlasError as fault:
            status, reason = "error", str(fault)
    public = scene.public_images(stage)
    scores = (
        harness.nothing_scored(truth, stage, public=public)
        if trial is None
        else harness.scored(trial, stage, public=public, other_batch=other)
    )
    found = None if trial is None else trial.found
    return Record(
        **facts,
        status=status,
        reason=reason,
        scores=scores.to_json(),
        own=own,
        notes={} if found is None else {n: float(v) for n, v in found.notes.items()},
        images=tuple(_digest(image)[:12] for image in truth.images),
        columns=()
        if trial is None or cell.seed != case.seeds[0] or cell.batch >= picture.SHOWN
        else picture.columns(truth.images, trial.images, scores.images),
        found="" if found is None else _digest(
            found.images, found.labels, found.label_counts, found.confidence
        ),
        reads=() if found is None else tuple(sorted(found.reads)),
        execution="" if found is None else found.execution,
        trace=() if trial is None else harness.trace(trial, trail, stage),
        costs={
            **(adversary.costs() if costs is None else costs),
            **({} if found is None else {"seconds": found.seconds}),
            **({} if trial is None else {"rounds": float(len(trial.records))}),
        },
    )  # fmt: skip


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- what is measured by name --------------------------------------------------------------------


def _without_attack(cell: Cell) -> Callable[[Cell], Any]:
    """Who measures the cell."""
    if cell.case.utility is not None:
        return utility.measure if cell.case.utility.course is None else course.measure
    if cell.case.labelling is not None:
        return labelling.measure
    measure: Callable[[Cell], Any] = _own(cell, "measure")
    return measure


def _own(cell: Cell, name: str) -> Any:
    assert cell.hook is not None
    if name == "choose":
        signature, purpose = "(cell) -> Attack", f"the preset {REHEARSED!r}"
    else:
        arguments = "cell" if name == "measure" else "trial, stage"
        signature, purpose = f"({arguments}) -> dict", "the measures that describe themselves"
    purpose = f"{purpose} of study {cell.study!r}"
    return own_code.function(cell.hook, cell.study, name, signature, purpose)


def _looked(cell: Cell, trial: harness.Trial, stage: Stage, attack: Attack) -> dict[str, Any]:
    """The measures that describe themselves: looks of the bench, and of the study's own file."""
    wanted = [m for m in cell.case.measures if isinstance(m, OwnMeasure)]
    if not wanted:
        return {}
    known = {m.computes for m in wanted} & looks.LOOKS.keys()
    values = looks.of(trial, stage, attack, known, target=cell.case.target)
    if any(m.computes not in known for m in wanted):
        values = {**_own(cell, "examine")(trial, stage), **values}
    found = {m.name: values[m.computes] for m in wanted if m.computes in values}
    tables = {name: value for name, value in found.items() if isinstance(value, dict)}
    return _checked(cell, found | {n: t[n] for n, t in tables.items() if n in t})


def _checked(cell: Cell, values: Any) -> dict[str, Any]:
    """What was measured: every measure that the case names, as finite numbers.

    What it measured beside, for other cases, is not kept.
    """
    wanted = [m.name for m in cell.case.measures if isinstance(m, OwnMeasure)]
    if not isinstance(values, dict) or not values.keys() >= set(wanted):
        got = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise own_code.StudyFault(
            f"{cell.hook or cell.study} must return the measures {sorted(wanted)} of case "
            f"{cell.label!r}; it returned {got}."
        )
    plain: dict[str, Any] = {}
    for name in wanted:
        value = values[name]
        numbers = torch.as_tensor(value, dtype=torch.float64)
        if numbers.ndim > 1 or not bool(torch.isfinite(numbers).all()):
            raise own_code.StudyFault(
                f"{cell.hook or cell.study}: {name!r} of case {cell.label!r} must be a finite "
                f"number or a list of them, got {value!r}."
            )
        plain[name] = numbers.tolist()
    return plain
