"""Cells on this machine: a few processes, each running one cell after the other."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from leakatlas.bench.cells import Cell
from leakatlas.bench.child import Child, Message
from leakatlas.bench.record import Record

MODULE = "leakatlas.bench.lane"


class Sink(Protocol):
    """What hears of cells; called from the thread that runs the study."""

    def begun(self, cell: Cell) -> None:
        """A cell is being run."""

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        """It is this far."""

    def done(self, cell: Cell, record: Record) -> None:
        """It has ended, one way or another."""


@dataclass
class _Lane:
    child: Child
    cell: Cell | None = None
    died: str | None = None


def run(
    cells: Sequence[Cell], workers: int, sink: Sink, *, enough: Callable[[], bool] | None = None
) -> None:
    """Run cells in ``workers`` processes.

    A process that dies is replaced; its cell becomes an error, and the others go on. Leaving this
    function by an exception (Ctrl-C) ends all processes; their cells have no record.

    Args:
        cells: In this order.
        workers: How many at a time.
        sink: Told of everything.
        enough: Asked before a cell is begun; no further one is once it says yes.
    """
    left = deque(cells)
    inbox: queue.SimpleQueue[tuple[Child, Message | None]] = queue.SimpleQueue()
    lanes: dict[Child, _Lane] = {}
    try:
        while True:
            while left and len(lanes) < workers:
                child = Child(MODULE, inbox)
                lanes[child] = _Lane(child)
            for lane in lanes.values():
                if lane.cell is None and left and not (enough is not None and enough()):
                    lane.cell = left.popleft()
                    sink.begun(lane.cell)
                    lane.child.send({"cell": lane.cell.to_json()})
            if all(lane.cell is None for lane in lanes.values()):
                return
            child, message = inbox.get()
            lane = lanes[child]
            if message is None:
                _buried(lane, lanes, inbox, sink)
            elif lane.cell is not None and "record" in message:
                cell, lane.cell, lane.died = lane.cell, None, None
                sink.done(cell, Record.from_json(message["record"]))
            elif lane.cell is not None and lane.died is None:
                sink.moved(lane.cell, message["progress"], message["note"])
    finally:
        for lane in lanes.values():
            lane.child.kill()


def _buried(
    lane: _Lane,
    lanes: dict[Child, _Lane],
    inbox: queue.SimpleQueue[tuple[Child, Message | None]],
    sink: Sink,
) -> None:
    """A process has died: its cell is an error, which a fresh process scores as such."""
    reason = f"its process ended: {lane.child.last_words()}"
    lane.child.close()
    del lanes[lane.child]
    if lane.cell is None:
        return
    if lane.died is not None:  # even scoring nothing kills it
        sink.done(lane.cell, blank(lane.cell, lane.died))
        return
    child = Child(MODULE, inbox)
    lanes[child] = _Lane(child, lane.cell, reason)
    child.send({"cell": lane.cell.to_json(), "died": reason})


def blank(cell: Cell, reason: str) -> Record:
    """An error of which nothing more is known, not even what was at stake."""
    return Record(
        cell=cell.name, code=cell.code_hash, study=cell.study, label=cell.label, seed=cell.seed,
        batch=cell.batch, status="error", reason=reason, recipe=cell.recipe,
    )  # fmt: skip
