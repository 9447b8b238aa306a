"""An adversary in a process of its own, which is given a view and nothing else."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from leakatlas.attacks.api import Reconstruction
from leakatlas.bench import task
from leakatlas.bench.adversary import Request, Turn
from leakatlas.bench.child import Child, Message
from leakatlas.blocks.watch import Watch
from leakatlas.errors import AttackCrashed

MODULE = "leakatlas.bench.worker"
HIDDEN = ("LEAKATLAS_DATA", "PWD", "OLDPWD")
"""Variables that name a place where the truth may lie."""

OVERRUN = (15.0, 0.25)
"""After the end of its time, the seconds and the part of that time that an attack may take to end:
a step that is under way, or packing what it found. Then its process is killed."""

GLANCE = 0.2
"""Seconds between two looks at whether a run was stopped."""


def numbered_there(device: str) -> str:
    """A device as the process that sees no other GPU calls it.

    >>> numbered_there("cuda:1"), numbered_there("cpu")
    ('cuda', 'cpu')
    """
    return device.partition(":")[0]


class Spawned:
    """One attack's process, started when it is first needed and again after it died.

    Args:
        memory: GiB that an attack may take on top of the libraries; no limit if None.
        seconds: Time after which it is killed, whatever budget it has; no limit if None. An attack
            keeps its budget itself; one that overruns it by far is killed as well.
        device: Where attacks compute; ``cuda:1`` hides every other GPU from the process.
    """

    process: Literal["own", "shared"] = "own"

    def __init__(
        self, *, memory: float | None = None, seconds: float | None = None, device: str = "cpu"
    ) -> None:
        self.memory = memory
        self.seconds = seconds
        self.device = device
        self._child: Child | None = None
        self._costs: Mapping[str, float] = {}

    def tamper(self, request: Request) -> Turn:
        """Prepare the next round; see :class:`~leakatlas.bench.adversary.Adversary`."""
        child = self._alive()
        message = self._asked("tamper", request, child.folder)
        return task.turn_of(self._answer(child, message, request.watch), child.folder)

    def attack(self, request: Request) -> Reconstruction:
        """Run the attack; see :class:`~leakatlas.bench.adversary.Adversary`."""
        child, watch = self._alive(), request.watch
        message = self._asked("attack", request, child.folder)
        answer = self._answer(child, message, watch)
        return task.found_of(answer, child.folder, request.view, watch)

    def _asked(self, what: Literal["tamper", "attack"], request: Request, folder: Path) -> Message:
        device = numbered_there(self.device)
        return task.asked(what, request, folder, memory=self.memory, device=device)

    def relay(
        self, message: Message, files: Mapping[str, bytes]
    ) -> tuple[Message, dict[str, bytes]]:
        """Pass on what a harness elsewhere asks, and bring back the answer with its files.

        Args:
            message: What was asked.
            files: What :func:`~leakatlas.bench.task.files_of` gave, by name.

        Raises:
            AttackCrashed: If the process ended.
        """
        child = self._alive()
        (child.folder / task.VIEW).mkdir(exist_ok=True)
        for name, content in files.items():
            (child.folder / name).write_bytes(content)
        answer = self._answer(child, message, Watch())
        back = [child.folder / name for name in (task.FOUND, task.SENT)]
        return answer, {path.name: path.read_bytes() for path in back if path.is_file()}

    def start(self) -> None:
        """Start the process now, instead of with the first attack."""
        self._alive()

    def costs(self) -> Mapping[str, float]:
        """What the last attack took: ``cpu_seconds``, ``peak_memory`` in MiB."""
        return self._costs

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _alive(self) -> Child:
        if self._child is None:
            env = {name: value for name, value in os.environ.items() if name not in HIDDEN}
            kind, _, number = self.device.partition(":")
            if kind == "cpu":
                env["CUDA_VISIBLE_DEVICES"] = ""
            elif number:
                seen = env.get("CUDA_VISIBLE_DEVICES")
                env["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(number)] if seen else number
            self._child = Child(MODULE, env=env)
        return self._child

    def _answer(self, child: Child, message: Message, watch: Watch) -> Message:
        """What the child answers; whatever interrupts the waiting ends the child.

        Otherwise its answer to this question would be taken for that to the next.
        """
        try:
            return self._awaited(child, message, watch)
        except BaseException:
            self.close()
            raise

    def _awaited(self, child: Child, message: Message, watch: Watch) -> Message:
        self._costs = {}
        child.send(message)
        deadline = None if self.seconds is None else time.monotonic() + self.seconds
        grace = max(OVERRUN[0], OVERRUN[1] * (watch.remaining() or 0.0))
        told = False
        while True:
            try:
                _, answer = child.inbox.get(timeout=GLANCE)
            except queue.Empty:
                if watch.stopped and not told:
                    child.send({"stop": True})
                    told = True
                if deadline is not None and time.monotonic() > deadline:
                    raise AttackCrashed(
                        f"the attack was killed after {self.seconds:g} s, the limit of its time"
                    ) from None
                left = watch.remaining()
                if left is not None and left < -grace:
                    raise AttackCrashed(
                        f"the attack was killed {-left:.0f} s after the end of its time; it does "
                        "not look at the clock often enough"
                    ) from None
                continue
            if answer is None:
                self._child = None
                words = child.last_words()
                child.close()
                raise AttackCrashed(f"the attack's process ended: {words}")
            if "answer" in answer:
                costs = answer.get("costs")
                if isinstance(costs, dict):
                    self._costs = {str(name): float(value) for name, value in costs.items()}
                return dict(answer["answer"])
            if watch.listen is not None:
                watch.listen(float(answer["progress"]), str(answer["note"]))
