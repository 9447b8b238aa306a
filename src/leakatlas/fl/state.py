"""Model states: what is broadcast, how it is hashed, and how an architecture is named."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.errors import InvalidInput, UnknownName

Tensors = Mapping[str, Tensor]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


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


def load_into(model: nn.Module, state: Tensors) -> nn.Module:
    """A copy of ``model`` holding ``state``.

    Raises:
        InvalidInput: If a name or shape does not fit the architecture.
    """
    clone = copy.deepcopy(model)
    own = model_state(model)
    for name in sorted({*own, *state}):
        got = tuple(state[name].shape) if name in state else "nothing"
        expected = tuple(own[name].shape) if name in own else "nothing"
        if got != expected:
            raise InvalidInput(
                f"The state does not fit {type(model).__name__}: at {name!r} the model expects "
                f"{expected}, the state holds {got}."
            )
    with torch.no_grad():
        for name, tensor in [*clone.named_parameters(), *clone.named_buffers()]:
            if tensor.dtype != state[name].dtype and tensor.is_floating_point():
                tensor.data = tensor.data.to(state[name].dtype)
            tensor.copy_(state[name])
    return clone


@dataclass(frozen=True)
class ModelRef:
    """How to rebuild an architecture in another process.

    Args:
        kind: ``builtin`` (a name of :mod:`leakatlas.models`), ``python``
            (``package.module:factory`` or ``file.py:factory``), or ``object`` (a live module that
            only its owner can rebuild).
        name: The name, or the class name for ``object``.
        kwargs: Arguments of the factory.
    """

    kind: Literal["builtin", "python", "object"]
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The architecture, freshly initialised.

        Raises:
            InvalidInput: If the factory cannot be found, or the model exists only as an object.
        """
        if self.kind == "builtin":
            return models.build(self.name, **self.kwargs)
        if self.kind == "object":
            raise InvalidInput(
                f"The model {self.name!r} was given as a live object and cannot be rebuilt from "
                "its description; pass it as `model=`, or describe it as 'file.py:factory'."
            )
        model = _factory(self.name)(**self.kwargs)
        if not isinstance(model, nn.Module):
            raise InvalidInput(
                f"{self.name!r} returned {type(model).__name__}, expected a torch.nn.Module."
            )
        return model


def _factory(path: str) -> Callable[..., object]:
    location, separator, attribute = path.rpartition(":")
    if not separator:
        raise InvalidInput(f"A model in Python code is 'file.py:factory', got {path!r}.")
    if location.endswith(".py"):
        file = Path(location)
        if not file.is_file():
            raise InvalidInput(f"The model file {location!r} does not exist (from {path!r}).")
        spec = importlib.util.spec_from_file_location(f"leakatlas_user_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise InvalidInput(f"{location!r} is not importable Python.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(location)
        except ModuleNotFoundError as problem:
            raise InvalidInput(
                f"The model module {location!r} is not importable: {problem}."
            ) from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownName(f"model factory in {location}", attribute, names)
    return factory  # type: ignore[no-any-return]  # checked callable just above
