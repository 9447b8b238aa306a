"""What a cell leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from leakatlas.bench.picture import Column
from leakatlas.params import checked

Status = Literal["complete", "cut short", "failed", "error", "refused"]
"""``failed``: the attack says so. ``error``: it crashed, was killed, or this machine lacks a
package or file. ``refused``: it lacks what it needs."""

FINAL = ("complete", "cut short", "failed", "refused")
"""A cell that ended in one of these is not run again; an error may be the machine's fault."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one cell.

    Args:
        cell: Name of the cell.
        code: Hash of the code that it ran.
        study: Name of the study.
        label: Name of the case.
        seed: Seed.
        batch: Which batch.
        status: How it ended.
        reason: Why, unless it is complete.
        recipe: All that decides what comes out.
        scores: Scores as JSON; None only if not even the truth could be staged.
        own: What the study's own Python file measured: numbers, or lists with one an original.
        notes: Figures that the attack noted.
        images: Short hashes of the originals, in the order of the scores.
        columns: The first victims and what came out, as small pictures.
        found: Hash of the candidates and labels, bit for bit.
        reads: What was read of the view.
        execution: How slopes were computed.
        trace: Seconds and mean PSNR of the best iterate so far, where it was kept.
        costs: Seconds, CPU seconds, rounds, peak memory in MiB.
        process: ``own`` if the attack ran in a process of its own; ``shared`` is for debugging.
        machine: See :mod:`leakatlas.bench.machine`.
        started: Date and time (UTC, ISO).
        confirmed: Hash of the code that made it, if another cell of its case came out equal under
            ``code`` (:mod:`leakatlas.bench.confirm`).
    """

    cell: str
    code: str
    study: str
    label: str
    seed: int
    batch: int
    status: Status
    reason: str = ""
    recipe: Mapping[str, Any]
    scores: Mapping[str, Any] | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    found: str = ""
    reads: tuple[str, ...] = ()
    execution: str = ""
    trace: tuple[tuple[float, float], ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    process: Literal["own", "shared"] = "own"
    machine: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    confirmed: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The record whose :meth:`to_json` is ``values``.

        Raises:
            ValueError: If a value is not of its type (or another of :data:`.sealed.MALFORMED`).
        """
        return cls(**checked(cls, values))

    @property
    def substance(self) -> dict[str, Any]:
        """What two runs of one cell on equal machines have in common, bit for bit."""
        incidental = ("costs", "started", "machine", "trace")
        plain = {name: value for name, value in self.to_json().items() if name not in incidental}
        return {**plain, "execution": self.execution.partition(";")[0]}  # without what it took

    @property
    def figures(self) -> dict[str, Any]:
        """What came out, whichever code made it."""
        return {n: v for n, v in self.substance.items() if n not in ("code", "confirmed")}
