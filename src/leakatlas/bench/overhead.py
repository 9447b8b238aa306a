"""What processes cost and give: the boundary around an attack, and two workers beside one.

CPU seconds are those of all processes that took part. Wall times mean something on an idle machine
only, so the load before the run stands beside them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from dataclasses import replace

from leakatlas.bench import lanes
from leakatlas.bench.adversary import Adversary, Here
from leakatlas.bench.cells import Cell
from leakatlas.bench.record import Record
from leakatlas.bench.run import run_cell
from leakatlas.bench.schema import AttackSpec
from leakatlas.bench.spawned import Spawned
from leakatlas.errors import AttackCrashed

Found = dict[str, float | list[float]]
REPEATED, STEPS, MS = 3, 1_200, 1_000
CELLS = {"convnet": 8}
"""By network; two of any other."""


def measure(cell: Cell) -> Found:
    """What the name of the case says."""
    return workers(cell) if cell.label == "two workers" else boundary(cell)


def equal(cell: Cell, steps: int, numbers: Sequence[int]) -> list[Cell]:
    """Cells of one set-up that differ in seed and image."""
    attack = AttackSpec(key="inverting_gradients", parameters={"steps": steps})
    case = cell.case.model_copy(update={"attack": attack, "measures": ("psnr",)})
    return [replace(cell, case=case, seed=n, batch=n, hook=None) for n in numbers]


def boundary(cell: Cell) -> Found:
    """CPU milliseconds of a cell in this process and with the attack in another, equal bit for bit.

    Of the latter, what twice as many cells take more: starting a process is no part of it.
    """
    count = CELLS.get(cell.case.model.builtin, 2)
    cells = equal(cell, 1, range(2 * count))
    run_cell(cells[0], Here())  # what is loaded once
    shared, own = [], []
    for _ in range(REPEATED):
        begun = time.process_time()
        here = [run_cell(one, Here()) for one in cells[:count]]
        shared.append(MS * (time.process_time() - begun) / count)
        few, there = _cpu(cells[:count])
        own.append(MS * (_cpu(cells)[0] - few) / count)
        if [record.found for record in here] != [record.found for record in there]:
            raise AttackCrashed("an attack found something else in a process of its own")
    return {
        "shared": shared,
        "own": own,
        "overhead": [b - a for a, b in zip(shared, own, strict=True)],
    }


def _cpu(cells: Sequence[Cell]) -> tuple[float, list[Record]]:
    """CPU seconds of both sides of the boundary, start of the process included."""
    before = time.process_time() + _children()
    with Spawned() as adversary:
        known: Adversary = adversary
        records = [run_cell(one, known) for one in cells]
    return time.process_time() + _children() - before, records


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def workers(cell: Cell) -> Found:
    """Wall seconds of equal cells under one worker and under two, and whether records agree."""
    cells = equal(cell, STEPS, range(8))
    load = os.getloadavg()[0]
    alone, one = _lasting(cells, 1)
    together, two = _lasting(cells, 2)
    alike = [float(one[c.name].substance == two[c.name].substance) for c in cells]
    attacks = [float(record.costs["cpu_seconds"]) for record in one.values()]
    return {"load": load, "one": alone, "two": together, "speedup": alone / together,
            "equal": alike, "attack": attacks}  # fmt: skip


class _Kept(dict[str, Record]):
    """A sink that keeps records by cell."""

    def begun(self, cell: Cell) -> None:
        """Nothing is shown."""

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        """Nothing is shown."""

    def done(self, cell: Cell, record: Record) -> None:
        """Keep it."""
        self[cell.name] = record


def _lasting(cells: Sequence[Cell], count: int) -> tuple[float, dict[str, Record]]:
    kept, begun = _Kept(), time.perf_counter()
    lanes.run(cells, count, kept)
    return time.perf_counter() - begun, kept
