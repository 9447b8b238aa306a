"""Cells on a Ray cluster: one task plays and scores a cell, another one attacks.

The task that attacks is ours and keeps a child process for the attack, exactly as a lane does
(:class:`~leakatlas.bench.spawned.Spawned`): what an attack returns reaches the cluster as plain
data only. Every node needs LeakAtlas installed, and the data folder under the same path.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from leakatlas.attacks.api import Reconstruction
from leakatlas.bench import task
from leakatlas.bench.adversary import Request, Turn
from leakatlas.bench.cells import Cell
from leakatlas.bench.child import Message
from leakatlas.bench.lanes import Sink, blank
from leakatlas.bench.record import Record
from leakatlas.bench.run import nothing_came, run_cell
from leakatlas.bench.spawned import Spawned, numbered_there
from leakatlas.blocks.watch import parse_budget
from leakatlas.errors import AttackCrashed, Unavailable

LARGE = 1_000_000
"""Bytes of a view from which it goes through the object store, once, instead of with the task."""

LOCAL = "local"
"""In place of an address: a Ray of this machine, for as long as the study runs."""


def run(
    cells: Sequence[Cell],
    address: str,
    sink: Sink,
    *,
    workers: int,
    enough: Callable[[], bool] | None = None,
) -> None:
    """Run cells on a cluster; as :func:`leakatlas.bench.lanes.run`.

    Args:
        cells: In this order.
        address: Of the cluster, ``auto`` for the running one, or ``local`` to start one.
        sink: Told of everything.
        workers: Processors of a Ray that is started here.
        enough: Asked before a cell is begun.

    Raises:
        Unavailable: If Ray is not installed, or the cluster cannot be reached.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        local = {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **(local if address == LOCAL else {"address": address}))
        except (ConnectionError, ValueError, RuntimeError) as problem:
            raise Unavailable(
                f"The Ray cluster at {address!r} cannot be reached: {problem}"
            ) from None
    try:
        _drive(ray, cells, sink, enough)
    finally:
        if ours:
            ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise Unavailable("--ray needs Ray: pip install 'leakatlas[ray]'.") from None
    return ray


def _drive(ray: Any, cells: Sequence[Cell], sink: Sink, enough: Callable[[], bool] | None) -> None:
    # A cell waits for its attack without using a processor, so twice as many may be on their way.
    most = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    play = ray.remote(num_cpus=0, max_retries=0)(_play)
    mourn = ray.remote(num_cpus=0, max_retries=0)(_mourn)
    left = deque(cells)
    running: dict[Any, tuple[Cell, str | None]] = {}
    while left or running:
        while left and len(running) < most and not (enough is not None and enough()):
            cell = left.popleft()
            sink.begun(cell)
            running[play.remote(cell.to_json())] = (cell, None)
        if not running:
            return
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        cell, died = running.pop(ready)
        try:
            sink.done(cell, Record.from_json(ray.get(ready)))
        except ray.exceptions.RayError as problem:
            reason = f"its process ended: {str(problem).strip().splitlines()[-1]}"
            if died is not None:  # even scoring nothing kills it
                sink.done(cell, blank(cell, died))
            else:
                running[mourn.remote(cell.to_json(), reason)] = (cell, reason)


def _play(cell: Message) -> Message:
    """Play and score a cell, in a process of the cluster."""
    made = Cell.from_json(cell)
    return run_cell(made, Elsewhere(made)).to_json()


def _mourn(cell: Message, reason: str) -> Message:
    return nothing_came(Cell.from_json(cell), reason).to_json()


_HELD: list[Spawned] = []
"""The attack's child of this process of the cluster; the next task finds it warm."""


def _attack(
    message: Message, files: Mapping[str, bytes], memory: float, seconds: float | None, device: str
) -> tuple[Message, dict[str, bytes], Mapping[str, float]]:
    """Attack a view, in a process of the cluster that keeps a child for it."""
    if _HELD and _HELD[0].device != device:
        _HELD.pop().close()
    if not _HELD:
        _HELD.append(Spawned(device=device))
    child = _HELD[0]
    child.memory, child.seconds = memory, seconds
    try:
        answer, back = child.relay(message, files)
    except AttackCrashed as crash:
        return {"refused": "AttackCrashed", "message": str(crash)}, {}, {}
    return answer, back, child.costs()


class Elsewhere:
    """The adversary in another process of the cluster.

    Args:
        cell: Its limits and its device count.
    """

    process: Literal["own", "shared"] = "own"

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._costs: Mapping[str, float] = {}

    def tamper(self, request: Request) -> Turn:
        """Prepare the next round; see :class:`~leakatlas.bench.adversary.Adversary`."""
        with tempfile.TemporaryDirectory(prefix="leakatlas-") as folder:
            return task.turn_of(self._answer("tamper", request, Path(folder)), Path(folder))

    def attack(self, request: Request) -> Reconstruction:
        """Run the attack; see :class:`~leakatlas.bench.adversary.Adversary`."""
        with tempfile.TemporaryDirectory(prefix="leakatlas-") as folder:
            answer = self._answer("attack", request, Path(folder))
            return task.found_of(answer, Path(folder), request.view, request.watch)

    def costs(self) -> Mapping[str, float]:
        """What the last attack took."""
        return self._costs

    def _answer(self, what: Literal["tamper", "attack"], request: Request, folder: Path) -> Message:
        ray, case = _ray(), self._cell.case
        device = numbered_there(self._cell.device)
        message = task.asked(what, request, folder, memory=case.memory, device=device)
        files: Any = task.files_of(folder)
        if sum(map(len, files.values())) > LARGE:
            files = ray.put(files)
        gpus = 0 if self._cell.device == "cpu" else 1
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_attack)
        sent = remote.remote(
            message,
            files,
            case.memory,
            parse_budget(case.time),
            device,
        )
        try:
            answer, back, self._costs = ray.get(sent)
        except ray.exceptions.RayError as problem:
            words = str(problem).strip().splitlines()[-1]
            raise AttackCrashed(f"the attack's process ended: {words}") from None
        for name, content in back.items():
            (folder / name).write_bytes(content)
        return dict(answer)
