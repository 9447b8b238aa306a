"""Which tensors can be judged, and their values in a form that has arithmetic.

A server chooses the number format of what it sends. Every format that holds one number per entry
is judged by its numbers (floats of 8 to 64 bits; integers, if the name says that they are a
weight or a bias); every other one is refused in words, never passed over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from leakatlas.errors import InvalidInput

REPEATED = 2**24
"""A view that repeats stored values is written out up to so many entries, and refused beyond."""


def values_of(name: str, tensor: object) -> Tensor | None:
    """The entries as float32 or float64, or None for a tensor that is no weight (indices, masks).

    Args:
        name: Of the tensor, as the state has it.
        tensor: What the state holds under that name.

    Raises:
        InvalidInput: If it is no tensor, holds no values, values without arithmetic, or values
            that are not finite.
    """
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise InvalidInput(
            f"lint expects tensors by name; {str(name)[:80]!r} is a {type(tensor).__name__}."
        )
    short = name[:80]
    _refuse_absent(short, tensor)
    dtype = tensor.dtype
    weight = tensor.is_floating_point() or name.endswith(("weight", "bias"))
    if not weight:
        return None
    tensor = tensor.detach()
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > max(stored, REPEATED * tensor.element_size()):
        raise InvalidInput(
            f"{short!r} of shape {tuple(tensor.shape)} repeats {stored} stored bytes (a view with "
            "stride 0), as no file of weights does; call .contiguous() if it is meant."
        )
    exact = torch.float64 if dtype == torch.float64 or not dtype.is_floating_point else None
    try:
        plain = tensor.to(exact or torch.float32)
    except RuntimeError:  # packed formats have no conversion
        raise InvalidInput(_no_arithmetic(short, dtype)) from None
    finite = torch.isfinite(plain)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise InvalidInput(
            f"{short!r} holds {bad} values that are not finite (of {plain.numel()}); no client can "
            "train on this model."
        )
    return plain


def _refuse_absent(name: str, tensor: Tensor) -> None:
    """Refuse what has no entries to look at, weight or not."""
    if is_lazy(tensor):
        raise InvalidInput(f"{name!r} has no shape yet; run the model once and lint it then.")
    if tensor.is_meta:
        raise InvalidInput(
            f"{name!r} is on the meta device and holds no values; load the weights first."
        )
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        raise InvalidInput(f"{name!r} is stored as {kind}; call .to_dense() before lint.")
    if tensor.is_quantized or tensor.dtype.is_complex:
        raise InvalidInput(_no_arithmetic(name, tensor.dtype))


def _no_arithmetic(name: str, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    return (
        f"{name!r} is {kind}, which lint cannot read as one number per entry; give the weights as "
        "floating point (dequantized, unpacked)."
    )
