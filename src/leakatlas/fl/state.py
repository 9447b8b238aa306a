"""Model states: what is broadcast, how it is hashed, and how an architecture is named."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leakatlas import models, tensorfiles
from leakatlas.errors import InvalidInput, shown
from leakatlas.fl import factory
from leakatlas.fl.intake import Selector, take_in

Tensors = Mapping[str, Tensor]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The live parameters that take gradients, by name; the others are constants."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the buffers, by name."""
    return {name: b.detach().clone() for name, b in model.named_buffers()}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of parameters and buffers, by name."""
    return {**parameters(model), **buffers(model)}


def state_hash(state: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: what an update says it was computed at."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on ``device``; a copy if it lies elsewhere."""
    if all(tensor.device == device for tensor in [*model.parameters(), *model.buffers()]):
        return model
    return copy.deepcopy(model).to(device)


def load_into(model: nn.Module, state: Tensors) -> nn.Module:
    """A copy of ``model`` holding ``state``.

    Raises:
        InvalidInput: If a name or shape does not fit the architecture.
    """
    clone = copy.deepcopy(model)
    own = held(model)
    for name in sorted({*own, *state}):
        got = tuple(state[name].shape) if name in state else "nothing"
        expected = tuple(own[name].shape) if name in own else "nothing"
        if got != expected:
            raise InvalidInput(
                f"The state does not fit {type(model).__name__}: at {name!r} the model expects "
                f"{expected}, the state holds {got}."
            )
        if own[name].is_floating_point() and not state[name].is_floating_point():
            raise InvalidInput(
                f"The state does not fit {type(model).__name__}: at {name!r} the model expects "
                f"{own[name].dtype}, the state holds {state[name].dtype}."
            )
    with torch.no_grad():
        for name, tensor in [*clone.named_parameters(), *clone.named_buffers()]:
            if tensor.dtype != state[name].dtype and tensor.is_floating_point():
                tensor.data = tensor.data.to(state[name].dtype)
            tensor.copy_(state[name])
    return clone


def held(model: nn.Module) -> dict[str, Tensor]:
    """The live parameters and buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


STATISTICS = ("running_mean", "running_var")
"""Buffers that training moves, by the last part of their names."""


def require_finite(state: Tensors, model: nn.Module, who: str) -> None:
    """Refuse a received state that holds NaN or infinite values: nothing follows from it.

    A constant of the architecture, such as the mask of an attention, may be infinite where the
    architecture's own is.

    Args:
        state: Parameters and buffers by name.
        model: The architecture.
        who: Whose state it is, for the message.

    Raises:
        InvalidInput: Naming the tensor.
    """
    constants = {n: b for n, b in model.named_buffers() if not n.endswith(STATISTICS)}
    for name, tensor in state.items():
        bad = tensorfiles.count_non_finite(tensor)
        if bad and not _infinite_alike(tensor, constants.get(name)):
            raise InvalidInput(
                f"{who} holds {bad} values at {shown(name)} that are not finite (of "
                f"{tensor.numel()}). Training diverged, or the file was damaged or tampered with: "
                "nothing follows from such a state. Take a checkpoint from before, or ask for it "
                "again."
            )


def _infinite_alike(tensor: Tensor, own: Tensor | None) -> bool:
    if own is None or own.shape != tensor.shape or bool(tensor.isnan().any()):
        return False
    return all(torch.equal(tensor == end, own == end) for end in (torch.inf, -torch.inf))


@dataclass(frozen=True)
class ModelRef:
    """How to rebuild an architecture in another process.

    Args:
        kind: ``builtin`` (a name of :mod:`leakatlas.models`), ``python``
            (``package.module:factory`` or ``file.py:factory``), or ``object`` (a live module that
            only its owner can rebuild).
        name: The name, or the class name for ``object``.
        kwargs: Arguments of the factory.
        output: Which part of the model's output holds the logits; the only tensor, if None.
    """

    kind: Literal["builtin", "python", "object"]
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Selector | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "kind": self.kind,
            "name": self.name,
            "kwargs": self.kwargs,
            **({} if self.output is None else {"output": self.output}),
        }

    def build(self, *, trust_code: bool = False) -> nn.Module:
        """The architecture, freshly initialised.

        Args:
            trust_code: Whether Python code that the reference names may be run. Say so only where
                a person named that code, never because a file does.

        Raises:
            InvalidInput: If the factory cannot be run, the model exists only as an object, or it
                is code that nobody trusted.
        """
        if self.kind == "builtin":
            return models.build(self.name, **self.kwargs)
        if self.kind == "object":
            raise InvalidInput(
                f"The model {shown(self.name)} was given as a live object and cannot be rebuilt "
                "from its description; pass it as `model=`, or describe it as 'file.py:factory'."
            )
        if not trust_code:
            raise InvalidInput(
                f"The model is Python code, {shown(self.name)}, and was not run: a description "
                "may come from a stranger. Pass the live model as `model=`, or `trust_code=True` "
                "if that code is yours."
            )
        model = factory.make(self.name, self.kwargs)
        return model if self.output is None else take_in(model, output=self.output).model

    @classmethod
    def from_json(cls, values: Any) -> ModelRef:
        """The reference whose :meth:`to_json` is ``values``; nothing is run.

        Raises:
            InvalidInput: If a key is missing or unknown, or a value is of the wrong type.
        """
        if isinstance(values, Mapping) and {"kind", "name"} <= values.keys() <= _KEYS:
            kind, name, kwargs = values["kind"], values["name"], values.get("kwargs", {})
            output = values.get("output")
            if (
                kind in _KINDS
                and isinstance(name, str)
                and isinstance(kwargs, dict)
                and (output is None or type(output) in (int, str))
            ):
                return cls(kind, name, kwargs, output)
        raise InvalidInput(
            f"A model is described by kind ({', '.join(_KINDS)}), name, kwargs and output; "
            f"got {shown(values)}."
        )


_KINDS = ("builtin", "python", "object")
_KEYS = {"kind", "name", "kwargs", "output"}
