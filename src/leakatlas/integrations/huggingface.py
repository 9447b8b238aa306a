"""Capture of what a Hugging Face ``Trainer`` does (``transformers`` 4.50 and newer).

>>> trainer = Trainer(model, args, callbacks=[CaptureCallback("/where/captures/go")], ...)
... # doctest: +SKIP

One call of ``trainer.train`` is one exchange. The trainer's defaults are AdamW, a falling learning
rate and clipping to norm 1, which no protocol describes: the capture says so in words. A round
that can be replayed wants ``optim="sgd"``, ``lr_scheduler_type="constant"``, ``max_grad_norm=0``.

Source: ``transformers.TrainerCallback`` of 5.24.0 (``on_train_begin``, ``on_train_end``).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from leakatlas.fl.state import model_state
from leakatlas.integrations.loops import LocalTraining, watching


class CaptureCallback(TrainerCallback):
    """Records what ``train`` does to a model.

    Args:
        folder: Where captures go.
        round: Number of the first; each ``train`` counts on.
        client: Whose training this is.
        examples: The client's; those of the training data loader if None.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        round: int = 0,
        client: str = "0",
        examples: int | None = None,
    ) -> None:
        self.folder, self.round, self.client, self.examples = folder, round, client, examples
        self.seen: LocalTraining | None = None
        self._hooks = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **live: Any,
    ) -> None:
        """Take the state before the first step."""
        del state, control
        model, loader = live["model"], live["train_dataloader"]
        self._hooks.close()  # of a training that failed
        self.seen = LocalTraining(
            model=model,
            examples=len(loader.dataset) if self.examples is None else self.examples,
            before=model_state(model),
            beyond=_beyond(args),
        )
        self._hooks.enter_context(watching(self.seen, _plain(live["optimizer"]), model))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **live: Any,
    ) -> None:
        """Take the state after the last step, and write the exchange."""
        del args, state, control
        assert self.seen is not None
        self._hooks.close()
        self.seen.after = model_state(live["model"])
        self.seen.save(self.folder, round=self.round, client=self.client)
        self.round += 1


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside Accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _beyond(args: TrainingArguments) -> tuple[str, ...]:
    found = []
    if args.max_grad_norm:
        found.append(f"gradients were clipped to norm {args.max_grad_norm:g}")
    if args.gradient_accumulation_steps != 1:
        found.append(f"gradients of {args.gradient_accumulation_steps} batches made one step")
    if args.bf16 or args.fp16:
        found.append("it ran in reduced precision")
    return tuple(found)
