"""Attacks that misbehave, in a module that another process can import."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import torch

from leakatlas.attacks.api import Attack, Reconstruction, attack
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import NonNegativeInt
from leakatlas.threat import Knowledge

PASSIVE = Knowledge.UPDATES | Knowledge.BASIC


@attack("villain", needs=PASSIVE)
@dataclass(frozen=True, kw_only=True)
class Villain(Attack):
    """Does what it is told to; ``orphan`` ends the process that keeps its own."""

    deed: str = "behave"
    gib: NonNegativeInt = 8

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        match self.deed:
            case "crash":
                raise ZeroDivisionError("a mistake in the attack")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "orphan":
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
            case "eat":
                torch.ones(self.gib * 2**28)
            case "hang":
                while True:
                    pass
            case "linger":
                for _ in watch.steps(10**12):
                    pass
            case "print":
                print('{"answer": {"status": "complete"}}', flush=True)
        x = torch.rand(view.batch_shape, generator=generator)
        return Reconstruction(images=view.box.normalize(x), notes={"pid": float(os.getpid())})
