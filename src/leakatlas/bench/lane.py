"""A lane: one local process that plays and scores cells; its adversary is a child of its own."""

from __future__ import annotations

from collections.abc import Callable

from leakatlas.bench.adversary import Here
from leakatlas.bench.cells import Cell
from leakatlas.bench.child import Message, serve
from leakatlas.bench.run import nothing_came, run_cell
from leakatlas.blocks.watch import Watch


def answer(message: Message, send: Callable[[Message], None]) -> Message:
    """Run the cell of a message, or only note that it died."""
    cell = Cell.from_json(message["cell"])
    if (reason := message.get("died")) is not None:
        return {"record": nothing_came(cell, str(reason)).to_json()}

    def progress(fraction: float, note: str) -> None:
        send({"progress": fraction, "note": note})

    return {"record": run_cell(cell, Here(), watch=Watch(listen=progress)).to_json()}


if __name__ == "__main__":
    serve(answer)
