"""Capture of a Lightning client's local training (``pytorch-lightning`` or ``lightning``, 2.x).

>>> trainer = Trainer(callbacks=[CaptureCallback("/where/captures/go")])     # doctest: +SKIP

One call of ``trainer.fit`` is one exchange: the module's state before it, and after. What the
trainer does beyond a plain loop (clipping, accumulation, reduced precision) is recorded in words,
since no protocol describes it.

Source: ``lightning.pytorch.callbacks.Callback`` of 2.6.6 (``on_train_start``,
``on_train_batch_start``, ``on_train_end``).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from leakatlas.errors import ProtocolError
from leakatlas.fl.state import model_state
from leakatlas.integrations.loops import LocalTraining, watching

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback, LightningModule, Trainer


class CaptureCallback(Callback):
    """Records what ``fit`` does to a module.

    Args:
        folder: Where captures go.
        round: Number of the first; each ``fit`` counts on.
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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state before the first step.

        Raises:
            ProtocolError: If there is not exactly one optimizer.
        """
        if len(trainer.optimizers) != 1:
            raise ProtocolError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers; captures "
                "describe training with one."
            )
        self.seen = LocalTraining(
            model=pl_module,
            examples=_examples(trainer) if self.examples is None else self.examples,
            before=model_state(pl_module),
            beyond=_beyond(trainer),
        )
        self._hooks.enter_context(watching(self.seen, trainer.optimizers[0], None))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; a module's ``forward`` need not be what its training step calls."""
        del trainer, batch_idx
        assert self.seen is not None
        if (examples := _length(batch)) is not None:
            self.seen.passed(examples, train_mode=pl_module.training)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state after the last step, and write the exchange."""
        del trainer
        assert self.seen is not None
        self._hooks.close()
        self.seen.after = model_state(pl_module)
        self.seen.save(self.folder, round=self.round, client=self.client)
        self.round += 1

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """A training that failed sends nothing, so nothing is recorded."""
        del trainer, pl_module, exception
        self._hooks.close()


def _examples(trainer: Trainer) -> int | None:
    try:
        return len(trainer.train_dataloader.dataset)
    except (AttributeError, TypeError):  # several loaders, or data without a length
        return None


def _length(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch)
    parts = batch.values() if isinstance(batch, dict) else batch
    if not isinstance(batch, dict | list | tuple):
        return None
    return next((n for n in map(_length, parts) if n is not None), None)


def _beyond(trainer: Trainer) -> tuple[str, ...]:
    found = []
    if trainer.gradient_clip_val:
        found.append(f"gradients were clipped to {trainer.gradient_clip_val:g}")
    if trainer.accumulate_grad_batches != 1:
        found.append(f"gradients of {trainer.accumulate_grad_batches} batches made one step")
    if str(trainer.precision) not in ("32-true", "64-true"):
        found.append(f"it ran in precision {trainer.precision}")
    return tuple(found)
