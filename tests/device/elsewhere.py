"""A pretended accelerator: tensors of another device, on which mixing raises as it does on a GPU.

Under :func:`pretended`, ``torch.device(NAME)`` holds tensors whose values lie in this process but
which no kernel of the CPU takes: every operation checks that its tensors are on one device, with
the exceptions that torch makes on CUDA (a number in a tensor without dimensions; an index; a
copy). ``numpy()`` does not exist there, nor does a generator. What runs under it without an error
makes no tensor on the wrong device; what it computes must be what the CPU computes, bit for bit.

The name is that of a device type of torch which no kernel of this build serves; nothing of the real
one is used.

Where a real device is at hand, ``LEAKATLAS_TEST_DEVICE=cuda`` takes that instead: what is computed
there must be what the CPU computes up to rounding (:func:`near`, :func:`alike`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from leakatlas import devices

DEVICE = torch.device("lazy", 0)

REAL = os.environ.get("LEAKATLAS_TEST_DEVICE", "")
"""A device of this machine, by the name that a person gives it."""

ROUNDING = 1e-4
"""How far a real device may be off where nothing amplifies its rounding."""

COPIES = {"copy_", "_to_copy", "_copy_from_and_resize", "set_"}
"""What may have a tensor of another device among its arguments."""

INDEXED = {"index", "index_put_", "index_put", "_unsafe_index", "_index_put_impl_"}
"""What takes indices of the CPU on any device."""


JOINED = {"cat", "stack"}
"""What takes no tensor of another device, even without dimensions."""


SET_DATA = vars(torch._C.TensorBase)["data"].__set__

LAZY = {
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}


class Mixed(AssertionError):
    """Tensors of two devices met in one operation, or a draw was made elsewhere than on the CPU."""


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device; ``held`` are its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        """Wrap values of the CPU."""
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=DEVICE,
        )  # fmt: skip
        made.held = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        """Without reading it."""
        return f"Elsewhere({self.held!r})"

    def data_ptr(self) -> int:
        """Where the values lie, by which code tells whether two tensors share them."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As :meth:`data_ptr`."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it unbound
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is left without the mode, as in a thread of the backward pass."""
        return _computed(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Function(TorchFunctionMode):
    """What torch does for tensors of its own alone, below or beside the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_pretended(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            asked = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            made = torch.tensor(args[1], dtype=asked["dtype"])
            return made.to(asked["device"])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _indices(args[1]), *args[2:])
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], Elsewhere):
            raise Mixed("numpy() of a tensor that is not on the CPU")
        found = func(*args, **kwargs)
        if func == SET_DATA and isinstance(args[0], Elsewhere):
            args[0].held = args[1].held
        return found


def _indices(index: Any) -> Any:
    """Lists as tensors; torch makes those of the tensor's own device, beside the dispatcher."""
    if isinstance(index, tuple):
        return tuple(_indices(one) for one in index)
    if isinstance(index, list):
        return torch.tensor(index, dtype=None if index else torch.int64)
    return index


@contextmanager
def pretended() -> Iterator[torch.device]:
    """A block in which the pretended device exists, or the real one that takes its place."""
    if REAL:
        yield devices.chosen(REAL)
        return
    with _Dispatch(), _Function():  # type: ignore[no-untyped-call]
        yield DEVICE


def near(exact: float) -> float:
    """A tolerance on the pretended device, on a real one at least that of its rounding."""
    return max(exact, ROUNDING) if REAL else exact


def alike(there: Any, here: Any) -> bool:
    """Whether two findings in plain JSON are equal; on a real device, numbers up to rounding.

    In words, numbers do not count there.
    """
    if not REAL:
        return bool(there == here)
    if isinstance(there, dict) and isinstance(here, dict):
        return there.keys() == here.keys() and all(alike(there[n], here[n]) for n in here)
    if isinstance(there, list | tuple) and isinstance(here, list | tuple):
        return len(there) == len(here) and all(map(alike, there, here))
    if isinstance(there, float) and isinstance(here, float):
        both = math.isnan(there) and math.isnan(here)
        return both or math.isclose(there, here, rel_tol=10 * ROUNDING, abs_tol=ROUNDING)
    if isinstance(there, str) and isinstance(here, str):
        return re.sub(NUMBER, "#", there) == re.sub(NUMBER, "#", here)
    return bool(there == here)


NUMBER = r"\d[\d.,]*(e[-+]?\d+)?"


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the values, and wrap what belongs to the pretended device."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in given if isinstance(t, Elsewhere)]
    asked = kwargs.get("device")
    name = func.overloadpacket.__name__
    if there:
        _check(name, args, given)
    elif asked is None or not _is_pretended(asked):
        return func(*args, **kwargs)
    if torch.Tag.nondeterministic_seeded in func.tags and (asked is None or _is_pretended(asked)):
        raise Mixed(f"{name} draws on the device, where a seed means something else")
    values = {id(t.held): t for t in there}

    def inner(t: Any) -> Any:
        return t.held if isinstance(t, Elsewhere) else t

    inside = tree_map(inner, kwargs)
    if asked is not None:
        inside["device"] = torch.device("cpu")
    # Below the dispatcher's key for lazy conjugation nobody would carry it out.
    func = LAZY.get(func, func)
    found = func(*tree_map(inner, args), **inside)
    back = name == "copy_" and not isinstance(args[0], Elsewhere)
    if back or (asked is not None and not _is_pretended(asked)):
        return args[0] if back else found

    def outer(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return values[id(t)] if id(t) in values else Elsewhere(t)

    return tree_map(outer, found)


def _check(name: str, args: Any, given: list[Tensor]) -> None:
    if name in COPIES:
        return
    if name in INDEXED and isinstance(args[0], Elsewhere):
        given = [t for t in given if not any(t is i for i in tree_leaves(args[1]))]
    least = 0 if name in JOINED else 1
    wrong = [t for t in given if not isinstance(t, Elsewhere) and t.dim() >= least]
    if wrong:
        shapes = ", ".join(str(tuple(t.shape)) for t in wrong)
        raise Mixed(f"{name} takes tensors of two devices; on the CPU: {shapes}")
