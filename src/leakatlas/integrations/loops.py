"""Capture of a plain PyTorch training loop, with nothing changed in it.

>>> model = torch.nn.Linear(2, 2)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
>>> with capture(model, optimizer, examples=4) as captured:
...     torch.nn.functional.cross_entropy(model(x), y).backward()
...     optimizer.step()
>>> captured.protocol()
FedAVG(epochs=1, batch_size=4, lr=0.1, ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.protocol import FedAVG
from leakatlas.fl.recording import BEYOND, Exchange, Place, Recorder, Scalar
from leakatlas.fl.state import model_state
from leakatlas.fl.update import Update

UNSUPPORTED = ("nesterov", "dampening", "amsgrad", "maximize", "decoupled_weight_decay")
"""Settings of SGD and Adam that no replay knows; off by default."""


@dataclass
class LocalTraining:
    """What a client's own loop did between two moments.

    Args:
        model: The live model.
        examples: In the client's data; None if it was not said.
        before: The state at the start, by name.
        after: The state at the end; empty until the ``with`` block has ended.
        batches: Examples of every forward pass in which gradients were taken.
        steps: Steps that the optimizer made.
        settings: The optimizer's, as read at its first step.
        settings_changed: Whether they were others at a later step (a schedule, say).
        train_mode: Whether the model was in train mode at every one of these passes; None before
            the first.
        beyond: What else happened that no protocol describes, in words; a trainer's own doing.
    """

    model: nn.Module
    examples: int | None = None
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    batches: list[int] = field(default_factory=list)
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    settings_changed: bool = False
    train_mode: bool | None = None
    beyond: tuple[str, ...] = ()

    def passed(self, examples: int, *, train_mode: bool) -> None:
        """Count a forward pass in which gradients are taken."""
        self.batches.append(examples)
        self.train_mode = train_mode and self.train_mode is not False

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Count a step of the optimizer; fits ``register_step_post_hook``."""
        now = _settings(optimizer)
        if not self.steps:
            self.settings = now
        self.settings_changed |= now != self.settings
        self.steps += 1

    def update(self) -> Update:
        """The change of the weights.

        Raises:
            ProtocolError: If the block has not ended, or nothing was trained in it.
            InvalidInput: If nobody said how many examples there are.
        """
        self._require_ended()
        return Update.from_state_dicts(
            self.before, self.after, self.model, num_examples=self._examples()
        )

    def capture(self) -> Capture:
        """What audits take: the state before, and the change."""
        return Capture(rounds=(CapturedRound(update=self.update(), received=self.before),))

    def protocol(self) -> FedAVG:
        """The local training, as far as it can be seen from outside.

        Raises:
            ProtocolError: If it is none that FedAVG describes: several optimizer settings, or
                steps that are no whole number of epochs.
        """
        self._require_ended()
        kind = self.settings.get("kind")
        if kind not in ("SGD", "Adam"):
            raise ProtocolError(
                f"The optimizer is {kind}; replays know SGD (with momentum) and Adam. The update "
                "can be captured, and described with a protocol= of your own."
            )
        strange = self._undescribed()
        if strange:
            raise ProtocolError(
                f"In this training {'; '.join(strange)}: replays do not know that. The update can "
                "be captured, and described with a protocol= of your own."
            )
        examples, size = self._examples(), max(self.batches)
        each = -(-examples // size)
        if self.steps % each:
            raise ProtocolError(
                f"{self.steps} steps over {examples} examples in batches of {size} are no whole "
                f"number of epochs ({each} steps each); give examples= as what was trained on, or "
                "a protocol= of your own."
            )
        momentum = {"momentum": self.settings["momentum"]} if kind == "SGD" else {}
        betas = {"betas": self.settings["betas"]} if kind == "Adam" else {}
        return FedAVG(
            epochs=self.steps // each,
            batch_size=size,
            lr=self.settings["lr"],
            optimizer="sgd" if kind == "SGD" else "adam",
            weight_decay=self.settings["weight_decay"],
            shuffle=examples > size,  # nobody saw the order
            mode="train" if self.train_mode else "eval",
            **momentum,
            **betas,
        )

    def save(
        self, folder: Path | str, *, round: int = 0, client: str = "0", place: Place = "raw"
    ) -> None:
        """Write the exchange into a folder of captures; see :mod:`leakatlas.fl.recording`."""
        self._require_ended()
        plain = {n: v for n, v in self.settings.items() if isinstance(v, bool | int | float | str)}
        facts: dict[str, Scalar] = {"steps": self.steps}
        if self.batches:
            facts["batch_size"] = max(self.batches)
        if strange := self._undescribed():
            facts[BEYOND] = "; ".join(strange)
        Recorder(folder=Path(folder)).write(
            Exchange(
                round=round,
                client=client,
                place=place,
                received=self.before,
                sent=self.after,
                examples=self.examples,
                settings={**plain, **facts, "mode": "train" if self.train_mode else "eval"},
                framework=f"torch {torch.__version__}",
            )
        )

    def _undescribed(self) -> list[str]:
        """What happened that no protocol here describes, in words."""
        odd = [n for n in UNSUPPORTED if self.settings.get(n)]
        strange = [f"the optimizer sets {', '.join(odd)}"] if odd else []
        if self.settings_changed:
            strange.append("the optimizer changed its settings between steps")
        return [*strange, *self.beyond]

    def _examples(self) -> int:
        if self.examples is None:
            raise InvalidInput(
                "Nobody said how many examples the client holds: capture(model, optimizer, "
                "examples=len(data))."
            )
        return self.examples

    def _require_ended(self) -> None:
        if not self.after:
            raise ProtocolError(
                "The state after training is taken where the `with` block ends: use it below."
            )
        if not self.steps:
            raise ProtocolError("The optimizer made no step inside the `with` block.")


@contextmanager
def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, examples: int | None = None
) -> Iterator[LocalTraining]:
    """Record what a training loop does to a model: ``with leakatlas.capture(...) as c: ...``.

    Args:
        model: The model that is trained in the block.
        optimizer: Its optimizer.
        examples: How many examples the client holds, which its update is weighted by.

    Yields:
        What was seen; complete when the block has ended.
    """
    seen = LocalTraining(model=model, examples=examples, before=model_state(model))
    with watching(seen, optimizer, model):
        yield seen
    seen.after = model_state(model)


@contextmanager
def watching(
    seen: LocalTraining, optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> Iterator[None]:
    """Count the steps of an optimizer, and the training passes of a model if one is given."""

    def before_forward(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and tensors:
            seen.passed(len(tensors[0]), train_mode=module.training)

    hooks = [optimizer.register_step_post_hook(seen.stepped)]
    if model is not None:
        hooks.append(model.register_forward_pre_hook(before_forward, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings of an optimizer that moves all parameters alike.

    Raises:
        ProtocolError: If its groups differ, which no protocol describes.
    """
    groups = [{n: v for n, v in g.items() if n != "params"} for g in optimizer.param_groups]
    if any(group != groups[0] for group in groups):
        raise ProtocolError(
            f"The groups of {type(optimizer).__name__} have different settings, which no protocol "
            "here describes."
        )
    words = ("lr", "momentum", "weight_decay", "betas", *UNSUPPORTED)
    return {"kind": type(optimizer).__name__} | {n: groups[0][n] for n in words if n in groups[0]}
