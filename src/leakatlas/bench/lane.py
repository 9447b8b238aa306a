"""A lane: one local process that plays and scores cells; the attack runs in a child of its own."""

from __future__ import annotations

from collections.abc import Callable

from leakatlas.bench.cells import Cell
from leakatlas.bench.child import Message, serve
from leakatlas.bench.run import nothing_came, run_cell
from leakatlas.bench.spawned import Spawned
from leakatlas.blocks.watch import Watch, parse_budget


def main() -> None:
    """Run cells until the driver is gone."""
    adversary = Spawned()

    def answer(message: Message, send: Callable[[Message], None]) -> Message:
        cell = Cell.from_json(message["cell"])
        if (reason := message.get("died")) is not None:
            return {"record": nothing_came(cell, str(reason)).to_json()}
        if adversary.device != cell.device:
            adversary.close()
        adversary.device = cell.device
        adversary.memory = cell.case.memory
        adversary.seconds = parse_budget(cell.case.time)

        def progress(fraction: float, note: str) -> None:
            send({"progress": fraction, "note": note})

        return {"record": run_cell(cell, adversary, watch=Watch(listen=progress)).to_json()}

    serve(answer)


if __name__ == "__main__":
    main()
