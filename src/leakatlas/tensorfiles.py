"""Files of tensors: safetensors, ``torch.save``, ``numpy.savez``; plain values, nothing else."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from leakatlas import limits, reading
from leakatlas.errors import InvalidInput, shown

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""Types of tensors that a model's state or an update may hold."""

# What torch.load raises on files that are damaged, foreign, or hold more than tensors.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,  # its reader of the oldest format asserts what it read
    struct.error,
)


def read_safetensors(path: Path | str, *, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the texts beside them.

    Args:
        path: The file; it may be as large as this machine's memory.
        what: For messages, such as "update".

    Raises:
        InvalidInput: If the file is missing, too large, truncated, or holds a tensor that is not
            plain.
    """
    who = f"The {what} {shown(str(path))}"
    require_room(path, what=what)
    damaged = (SafetensorError, LookupError, TypeError, AttributeError, RuntimeError)
    way_out = "It may be truncated or no safetensors file; ask for it again."
    with reading.boundary(who, *damaged, way_out=way_out):
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            texts = dict(file.metadata() or {})
    for name, tensor in tensors.items():
        require_plain(name, tensor, who)
    return tensors, texts


def read_torch(path: Path | str, *, what: str) -> object:
    """The content of a ``torch.save`` file: tensors and plain values, never code.

    Raises:
        InvalidInput: If the file is missing, too large, compressed, or holds anything else.
    """
    who = f"The {what} {shown(str(path))}"
    require_room(path, what=what)
    way_out = (
        "It is not a file of plain tensors: it is damaged, or it holds code or whole objects, "
        "which are never loaded. Save the weights alone: "
        "safetensors.torch.save_file(model.state_dict(), PATH)."
    )
    with reading.boundary(who, *_UNREADABLE, zipfile.BadZipFile, way_out=way_out):
        _require_stored(path, who)
        with warnings.catch_warnings():
            # torch remarks on sparse and legacy files; what we refuse, we explain ourselves.
            warnings.simplefilter("ignore")
            found: object = torch.load(path, map_location="cpu", weights_only=True)
            return found


def read_npz(path: Path | str, *, what: str) -> dict[str, NDArray[Any]]:
    """Arrays by name of a file of ``numpy.savez``; never objects.

    Raises:
        InvalidInput: If the file is missing, damaged, holds pickled objects, or is too large once
            it is unpacked.
    """
    who = f"The {what} {shown(str(path))}"
    require_room(path, what=what)
    way_out = "It is damaged, or no file that numpy.savez(PATH, *arrays) wrote."
    with reading.boundary(who, *_UNREADABLE, zipfile.BadZipFile, zlib.error, way_out=way_out):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            limits.require_memory(who, unpacked, "once it is unpacked")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def require_room(path: Path | str, *, what: str) -> None:
    """Refuse a file that is none, or that this machine's memory cannot hold.

    Raises:
        InvalidInput: Naming the file.
    """
    who = f"The {what} {shown(str(path))}"
    with reading.boundary(who):
        if not Path(path).exists():
            raise InvalidInput(f"{who} does not exist.")
        if not Path(path).is_file():
            raise InvalidInput(f"{who} is not a file.")
        if (size := Path(path).stat().st_size) > limits.memory():
            raise InvalidInput(
                f"{who} has {limits.size(size)}; this machine's memory has "
                f"{limits.size(limits.memory())}."
            )


def require_plain(name: str, tensor: object, who: str) -> None:
    """Refuse what is no dense tensor with values of its own.

    Raises:
        InvalidInput: For another object, a sparse, quantised or meta tensor, an exotic type, or
            one that claims more values than it stores.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        got = type(tensor).__name__
        raise InvalidInput(f"{who}: expected tensors by name; {shown(name)} is a {got}.")
    assert isinstance(tensor, Tensor)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise InvalidInput(f"{who}: {name} is sparse or quantised; save it as a dense tensor.")
    if tensor.device.type == "meta":
        raise InvalidInput(f"{who}: {name} is a meta tensor, which has a shape and no values.")
    if tensor.dtype not in DTYPES:
        raise InvalidInput(
            f"{who}: {name} is {tensor.dtype}; expected floats, whole numbers or booleans."
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InvalidInput(
            f"{who}: {name} has shape {tuple(tensor.shape)} but stores only "
            f"{tensor.untyped_storage().nbytes()} bytes; save it with .contiguous()."
        )


def count_non_finite(tensor: Tensor) -> int:
    """How many values are infinite or NaN (float8 included, which torch cannot ask)."""
    if not tensor.is_floating_point():
        return 0
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    if torch.isfinite(tensor.sum()):  # several times faster, and most often all there is to do
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _require_stored(path: Path | str, who: str) -> None:
    """torch.save never compresses; a file that is compressed may be a thousand times larger."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InvalidInput(f"{who} is a compressed archive, not a file of torch.save.")
