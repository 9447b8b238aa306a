"""Models as people hold them, made into what a client trains: unwrapped, materialised, one output.

Names of parameters are those of the inner model, so that updates and checkpoints fit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from leakatlas.errors import InvalidInput
from leakatlas.fl import draws
from leakatlas.models.structure import in_mode

Selector = int | str
"""Which part of a model's output holds the logits: a place in a tuple, a key, or an attribute."""

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "GradSampleModule": "_module",
}
"""The attribute that holds the inner model, by class."""


class Intake(NamedTuple):
    """A model that is ready, and what was done to get there.

    Args:
        model: A copy, unless nothing had to be done.
        notes: For people; empty if nothing was done.
    """

    model: nn.Module
    notes: tuple[str, ...] = ()


def take_in(
    model: nn.Module, example: Tensor | None = None, *, output: Selector | None = None
) -> Intake:
    """Unwrap, materialise and select; the given model is not changed.

    Args:
        model: Possibly in a wrapper (DataParallel, ``torch.compile``, Opacus' GradSampleModule).
        example: Inputs ``(1, C, H, W)`` that lazy layers take their sizes from.
        output: Which part of its output holds the logits; the only tensor, if None.

    Raises:
        InvalidInput: If lazy layers stay without sizes, or ``output`` does not exist.
    """
    notes: list[str] = []
    inner = model
    while type(inner).__name__ in _WRAPPERS:
        wrapper, attribute = type(inner).__name__, _WRAPPERS[type(inner).__name__]
        inner = getattr(inner, attribute)
        notes.append(f"unwrapped {type(inner).__name__} from {wrapper}")
    if inner is not model:
        inner = _without_wrappers_hooks(copy.deepcopy(inner))
    _require_copies(inner)
    if _lazy(inner):
        inner = _materialised(copy.deepcopy(inner), example)
        notes.append(
            f"the lazy layers of {type(inner).__name__} took their sizes from the images and drew "
            "their weights now: nobody's client has these"
        )
    if output is not None:
        inner = copy.deepcopy(inner) if inner is model else inner
        inner.register_forward_hook(Select(output))
        notes.append(f"the logits are {_words(output)} of the model's output")
    return Intake(inner, tuple(notes))


class Select:
    """A forward hook that passes one part of the output on; a hook keeps parameters' names."""

    def __init__(self, output: Selector) -> None:
        self.output = output

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], found: Any) -> Tensor:
        """The selected part.

        Raises:
            InvalidInput: If there is none, or it is no tensor.
        """
        del inputs
        if isinstance(found, Tensor):  # already selected, in a copy of a copy
            return found
        part = _part(found, self.output)
        if not isinstance(part, Tensor):
            raise InvalidInput(
                f"output: {type(module).__name__} has no tensor at {_words(self.output)}; its "
                f"output is {outline(found)}."
            )
        return part


def _part(found: Any, output: Selector) -> Any:
    if isinstance(output, int):
        held = list(found.values()) if isinstance(found, Mapping) else found
        return held[output] if isinstance(held, list | tuple) and output < len(held) else None
    if isinstance(found, Mapping):
        return found.get(output)
    return getattr(found, output, None)


def outline(found: Any) -> str:
    """What a model returned, in words, with the selectors that fit.

    >>> outline({"logits": torch.zeros(1, 3), "aux": None})
    "a dict with 'logits' (1, 3), 'aux' NoneType"
    """

    def kind(part: Any) -> str:
        return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__

    if isinstance(found, Mapping):
        inside = ", ".join(f"{key!r} {kind(part)}" for key, part in found.items())
        return f"a {type(found).__name__} with {inside or 'nothing'}"
    if isinstance(found, list | tuple):
        inside = ", ".join(f"{index}: {kind(part)}" for index, part in enumerate(found))
        return f"a {type(found).__name__} with {inside or 'nothing'}"
    return kind(found)


def trained_output(model: nn.Module, x: Tensor) -> str | None:
    """What a model returns in train mode, in words, if it is no tensor; None if it is one.

    Args:
        model: Left as it was.
        x: ``(1, C, H, W)``; only its shape counts.
    """
    like = torch.zeros_like(x).repeat(2, 1, 1, 1)
    with in_mode(model, train=True), torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = None
        if draws.is_large(model):
            with contextlib.suppress(*draws.NEEDS_VALUES):
                found = draws.without_values(model, like)
        if found is None:
            with draws.averaged():  # only the kind of what comes out counts
                found = copy.deepcopy(model)(like)
    return None if isinstance(found, Tensor) else outline(found)


def _words(output: Selector) -> str:
    return f"place {output}" if isinstance(output, int) else repr(output)


def _without_wrappers_hooks(model: nn.Module) -> nn.Module:
    """Without the hooks that Opacus left for its own gradients."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._backward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                owner = getattr(hook, "func", hook)
                if (getattr(owner, "__module__", None) or "").startswith("opacus"):
                    del hooks[key]
    return model


_OLD = ("torch.nn.utils.spectral_norm", "torch.nn.utils.weight_norm")
"""Where torch's former parametrisations come from, by hooks that leave results in the module."""


def _require_copies(model: nn.Module) -> None:
    """Refuse what torch cannot copy, before anything runs."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            kind = type(hook)
            if kind.__module__ in _OLD:
                made = kind.__module__.rpartition(".")[2]
                raise InvalidInput(
                    f"Layer {name!r} of {type(model).__name__} was made by torch.nn.utils.{made}, "
                    "which keeps a result of autograd in the layer, so that no copy of the model "
                    f"can be trained; make it by torch.nn.utils.parametrizations.{made}."
                )


def _lazy(model: nn.Module) -> bool:
    held = [*model.parameters(), *model.buffers()]
    return any(isinstance(t, UninitializedParameter | UninitializedBuffer) for t in held)


def _materialised(model: nn.Module, example: Tensor | None) -> nn.Module:
    if example is None:
        raise InvalidInput(
            f"{type(model).__name__} has lazy layers, whose sizes come from the first input; run "
            "the model once before it is used."
        )
    with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model(torch.zeros_like(example))
    return model
