"""Old figures under new code: one cell of every stale case is made again and stands for the others.

The cells of a case run the same code and differ in seed and images only. Where the one that is made
again equals its record bit for bit, the case's other records count as made by the present code, and
say that they were confirmed; where it does not, the case stays stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from leakatlas.bench import lanes
from leakatlas.bench.cells import Cell
from leakatlas.bench.record import FINAL, Record
from leakatlas.bench.runner import Options, standing, write
from leakatlas.bench.store import Store
from leakatlas.bench.study import Study


@dataclass
class Confirmed:
    """What came of it, case by case.

    Args:
        equal: Cases whose cell came out equal.
        apart: Cases whose cell did not.
        left: Stale cases of which no cell was made again in time.
    """

    equal: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def confirm(study: Study, options: Options, sink: lanes.Sink | None = None) -> Confirmed:
    """Make one cell of every stale case again, keep what follows, and write the result file.

    Args:
        study: Of this checkout.
        options: As for a run; a cluster is not used.
        sink: Told about progress.

    Raises:
        InvalidInput: If a record cannot be written.
    """
    now, kept = standing(study, options), Store(options.records / study.name)
    old: dict[str, list[tuple[Cell, Record]]] = {}
    for cell in now.cells:
        record = now.records.get(cell.name)
        if record is not None and record.status in FINAL and record.code != cell.code_hash:
            old.setdefault(cell.label, []).append((cell, record))
    heard = _Heard(sink)
    first = [cells[0][0] for cells in old.values()]
    lanes.run(first, min(options.workers, len(first)), heard, enough=options.enough())
    found = Confirmed()
    for label, ((cell, before), *others) in old.items():
        made = heard.records.get(cell.name)
        if made is None or made.status == "error":
            found.left.append(label)
            continue
        kept.append(made)
        if made.figures != before.figures:
            found.apart.append(label)
            continue
        found.equal.append(label)
        for _, record in others:
            maker = record.confirmed or record.code
            kept.append(replace(record, code=made.code, confirmed=maker))
    write(study, options)
    return found


class _Heard:
    """Keeps records, and passes on what it hears."""

    def __init__(self, sink: lanes.Sink | None) -> None:
        self.records: dict[str, Record] = {}
        self._sink = sink

    def begun(self, cell: Cell) -> None:
        if self._sink is not None:
            self._sink.begun(cell)

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        if self._sink is not None:
            self._sink.moved(cell, fraction, note)

    def done(self, cell: Cell, record: Record) -> None:
        self.records[cell.name] = record
        if self._sink is not None:
            self._sink.done(cell, record)
