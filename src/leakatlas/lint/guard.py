"""A client that refuses to train on a tampered model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakatlas.errors import ProtocolError
from leakatlas.fl import ClientContext, Defense, Trait, model_state
from leakatlas.lint.examine import lint


@dataclass(frozen=True, kw_only=True)
class LintGuard(Defense):
    """Lints the received model in the first step of a round, and refuses the round on an alarm.

    The state of the last accepted model is kept as the reference of the next round. It is not a
    row of the tables: nothing that is sent changes, there is only nothing sent.

    Args:
        enabled: The knob; off, the client trains on whatever it gets.
        use_batch: Whether the checks on the client's own batch are run too.
    """

    key: ClassVar[str] = "lint_guard"
    knob: ClassVar[str] = "enabled"
    neutral: ClassVar[bool] = False
    stage: ClassVar[int] = 1  # before any defense changes the batch
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.ONLY_REFUSES})

    enabled: bool = True
    use_batch: bool = True

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """Judge the model once a round.

        Raises:
            ProtocolError: On an alarm, with the evidence.
        """
        memory = context.memory
        if not self.enabled or memory.get("judged") == context.round:
            return x, y
        received = model_state(context.model)
        # Dropout would draw from the stream of the training that follows.
        with torch.random.fork_rng(devices=[]):
            verdict = lint(
                context.model,
                reference=memory.get("accepted"),
                # Who was absent meets a model that has gone on by several rounds.
                previous=memory.get("accepted")
                if memory.get("judged") == context.round - 1
                else None,
                batch=(x, y) if self.use_batch else None,
            )
        if verdict.alarm:
            raise ProtocolError(
                f"Client {context.client} refuses round {context.round}: the received model looks "
                f"tampered with ({', '.join(verdict.checks)}). {verdict}"
            )
        memory["judged"], memory["accepted"] = context.round, received
        return x, y
