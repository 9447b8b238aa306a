"""The process of an attack: it is given views, and nothing else.

No harness object, no truth and no path to either; its working directory is a temporary folder of
its own. It imports the attacks and what they stand on, not the rooms where the truth is.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from leakatlas.bench import machine, task
from leakatlas.bench.child import Message, serve
from leakatlas.blocks.watch import Watch

MIB = 2**20


def main() -> None:
    """Answer until the harness is gone."""
    stop = Watch()
    machine.end_first()
    # The first optimizer of a process imports for seconds, which would be counted as an attack's.
    torch.optim.SGD([torch.zeros(1)], lr=1.0)

    def answer(message: Message, send: Callable[[Message], None]) -> Message:
        torch.set_num_threads(message["threads"])
        os.environ["LEAKATLAS_CACHE"] = message["cache"]
        given = message["memory"]
        limit_memory(machine.available_memory() if given is None else given)
        machine.forget_peak()
        begun = time.process_time()
        found = task.perform(
            message,
            Path.cwd(),
            listen=lambda fraction, note: send({"progress": fraction, "note": note}),
            parent=stop,
        )
        peak = machine.peak_memory()
        costs = {"cpu_seconds": time.process_time() - begun}
        return {"answer": found, "costs": costs if peak is None else {**costs, "peak_memory": peak}}

    serve(answer, interrupt=stop.stop)


def limit_memory(gib: float | None) -> None:
    """Allow this process so much private memory on top of what it holds now.

    ``RLIMIT_DATA`` counts private writable memory; the address space would also count libraries and
    what a GPU driver reserves without using it. An allocation beyond it fails, and with it the
    attack, not the machine.
    """
    held = machine.data_memory()
    if gib is None or held is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held * MIB + gib * 1024 * MIB), hard))


if __name__ == "__main__":
    main()
