"""Arrays as FL systems hand them over, sorted by a model's own names.

A list comes in the order of ``state_dict`` (Flower's custom: parameters and buffers, counters
among them), or of ``parameters()`` (a list of gradients), in full or without what takes no
gradient; names that only count (``0``, ``1``, ...) are places in such a list. A mapping may carry
the prefix of a wrapper (``module.``, ``_orig_mod.``, ``model.``). What is what follows from the
number of arrays and their shapes; where these do not decide, the message says so.
A counter (``num_batches_tracked``) may come as an array of one number, or of none:
``torch.Tensor(array)`` makes an empty tensor of it, and the number is lost. Tied parameters stand
once in the model and under each of their names in ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, shown

Arrays = Mapping[str, Any] | Sequence[Any]
"""Tensors, arrays or numbers, by name or in an order; None where there is none."""


@dataclass(frozen=True)
class Named:
    """Arrays by the model's names.

    Args:
        parameters: By name; those that were given.
        buffers: By name; those that were given.
        order: How they were understood, in words.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    order: str


def by_name(content: Arrays, model: nn.Module, what: str) -> Named:
    """Sort arrays by the names of a model.

    Args:
        content: A mapping, or a sequence in the order of ``state_dict`` or of ``parameters()``.
        model: Whose names and shapes these are.
        what: For messages, such as "update".

    Raises:
        InvalidInput: If they do not fit; with what the model has and how to make them.
    """
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    tied = _tied(model)
    shapes |= {name: shapes[first] for name, first in tied.items()}
    if isinstance(content, Mapping) and _numbered(content) and not set(content) & set(shapes):
        content = [content[str(place)] for place in range(len(content))]
    if isinstance(content, Mapping):
        named, order = _from_mapping(content, shapes, model, what)
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        named, order = _from_sequence(content, shapes, model, what)
    else:
        raise InvalidInput(
            f"The {what} is a {type(content).__name__}; expected arrays by name, or a list in the "
            "order of model.state_dict() or model.parameters()."
        )
    parameters = dict(model.named_parameters())
    counters = {n for n, b in model.named_buffers() if not b.is_floating_point() and not b.dim()}
    named = {n: _counter(v) if n in counters else v for n, v in named.items()}
    named = _once(named, tied, shapes, what)
    tensors = {n: _tensor(v, n, shapes[n], what) for n, v in named.items() if v is not None}
    return Named(
        {n: tensors[n] for n in parameters if n in tensors},
        {n: t for n, t in tensors.items() if n not in parameters},
        order,
    )


def _numbered(content: Mapping[str, Any]) -> bool:
    return bool(content) and set(content) == {str(place) for place in range(len(content))}


def _tied(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, each with the one that the model goes by."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if first[id(p)] != name}


def _once(
    named: Mapping[str, Any],
    tied: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
) -> dict[str, Any]:
    """Tied parameters under the one name that the model goes by."""
    found = {name: value for name, value in named.items() if name not in tied}
    for name, first in tied.items():
        if named.get(name) is None:
            continue
        shape = shapes[name]
        held = found.setdefault(first, named[name])
        if not torch.equal(*(_tensor(v, name, shape, what) for v in (held, named[name]))):
            raise InvalidInput(
                f"The {what} differs at {name!r} and {first!r}, which are one parameter of this "
                "model: another model, or another order."
            )
    return found


def _counter(value: Any) -> Any:
    """One number, in whatever shape it came; None where it was lost on the way."""
    if value is None or tuple(np.shape(value)) == ():
        return value
    return None if 0 in np.shape(value) else np.asarray(value).reshape(-1)[0]


def _from_mapping(
    content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module, what: str
) -> tuple[dict[str, Any], str]:
    named = {str(name): value for name, value in content.items()}
    stripped = ""
    while named and not set(named) & set(shapes):
        first, dot, _ = next(iter(named)).partition(".")
        prefix = first + dot
        if not dot or not all(n.startswith(prefix) for n in named):
            break
        named = {n.removeprefix(prefix): v for n, v in named.items()}
        stripped += prefix
    unknown = [stripped + name for name in named if name not in shapes]
    if unknown or not named:
        raise InvalidInput(
            f"The {what} has {len(named)} names, of which {type(model).__name__} lacks "
            f"{_some(unknown) if unknown else 'all'}; the model has {_some(list(shapes))}."
        )
    return named, "by name" + (f", without the prefix {stripped!r}" if stripped else "")


def _from_sequence(
    content: Sequence[Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module, what: str
) -> tuple[dict[str, Any], str]:
    parameters = [name for name, _ in model.named_parameters()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    whole = [name for name in model.state_dict() if name in shapes]
    integers = {n for n, b in model.named_buffers() if not b.is_floating_point()}
    orders = {
        "in the order of state_dict()": whole,
        "in the order of state_dict() without counters": [n for n in whole if n not in integers],
        "in the order of parameters()": parameters,
        "in the order of the parameters that take gradients": trained,
    }
    seen = [() if value is None else tuple(np.shape(value)) for value in content]
    for words, names in orders.items():
        if len(names) == len(seen) and all(
            value is None
            or shape == shapes[name]
            or (name in integers and shapes[name] == () and shape in ((0,), (1,)))
            for value, shape, name in zip(content, seen, names, strict=True)
        ):
            return dict(zip(names, content, strict=True)), words
    lengths = ", ".join(
        f"{len(names)} {words}"
        for words, names in {w: n for w, n in orders.items() if len(n)}.items()
    )
    closest = next((names for names in orders.values() if len(names) == len(seen)), None)
    if closest is None:
        raise InvalidInput(
            f"The {what} is a list of {len(seen)} arrays; {type(model).__name__} has {lengths}. "
            "Make it as [p.grad for p in model.parameters()], or as "
            "[v.numpy() for v in model.state_dict().values()], or pass a mapping by name."
        )
    place = next(
        i for i, (value, name) in enumerate(zip(content, closest, strict=True))
        if value is not None and seen[i] != shapes[name]
    )  # fmt: skip
    raise InvalidInput(
        f"The {what} is a list of {len(seen)} arrays, as many as {type(model).__name__} has, but "
        f"array {place} has shape {seen[place]} where {closest[place]!r} has "
        f"{shapes[closest[place]]}: another model, or another order."
    )


def _tensor(value: Any, name: str, shape: tuple[int, ...], what: str) -> Tensor:
    try:
        found = torch.as_tensor(value).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(
            f"The {what} holds {shown(value)} at {name!r}; expected an array of shape {shape}."
        ) from None
    if tuple(found.shape) != shape:
        raise InvalidInput(
            f"The {what} has shape {tuple(found.shape)} at {name!r}, the model {shape}."
        )
    return found


def _some(names: Sequence[str]) -> str:
    shown_names = ", ".join(repr(name) for name in names[:3])
    return shown_names if len(names) <= 3 else f"{shown_names} and {len(names) - 3} more"
