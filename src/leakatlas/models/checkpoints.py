"""Weights: those shipped with the package, and those of a user's file.

Every shipped file ``weights/NAME.safetensors`` has a card ``weights/NAME.json`` that says where
it comes from; the weights are checked against the card's SHA-256 before use. A user's file is
untrusted: only plain tensors are read from it, never code.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.models.registry import build

WEIGHTS = Path(str(resources.files("leakatlas.models") / "weights"))

# What torch.load raises on files that are damaged, foreign, or hold more than tensors.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,  # its reader of the oldest format asserts what it read
    struct.error,
)
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers nest weights


@dataclass(frozen=True, kw_only=True)
class Card:
    """Where shipped weights come from.

    Args:
        name: Name of the weights.
        model: Name for :func:`leakatlas.models.build`.
        settings: Settings for :func:`leakatlas.models.build`.
        box: Pixel space of the model (JSON of a ``leakatlas.data.Box``); None for a generator.
        data: What it was trained on, with source.
        split: Which part of that data.
        recipe: The command that makes the file again.
        seed: Seed of that command.
        epochs: Passes over the split.
        figures: What it reached on which images.
        date: Day of training.
        license: Licence of the weights.
        sha256: Of the safetensors file.
    """

    name: str
    model: str
    settings: dict[str, Any]
    box: dict[str, Any] | None
    data: str
    split: str
    recipe: str
    seed: int
    epochs: int
    figures: dict[str, float]
    date: str
    license: str
    sha256: str


def shipped() -> tuple[str, ...]:
    """Names of the weights in the package, sorted."""
    return tuple(sorted(path.stem for path in WEIGHTS.glob("*.safetensors")))


def card(name: str) -> Card:
    """The provenance card of shipped weights.

    Raises:
        UnknownName: If no such weights are shipped.
        InvalidInput: If the card is damaged.
    """
    if name not in shipped():
        raise UnknownName("shipped weights", name, shipped())
    path = WEIGHTS / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Card(**values)
    except (OSError, ValueError, TypeError) as problem:
        raise InvalidInput(f"{path}: not a provenance card: {problem}; reinstall.") from None


def load_weights(name: str) -> dict[str, Tensor]:
    """Shipped weights by parameter and buffer name, in float32, checked against their card.

    Raises:
        UnknownName: If no such weights are shipped.
        InvalidInput: If the file is not the one that its card describes.
    """
    expected = card(name).sha256
    path = WEIGHTS / f"{name}.safetensors"
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise InvalidInput(
            f"{path}: SHA-256 is {found}, its card says {expected}; reinstall the package."
        )
    return {
        key: value.to(torch.float32) if value.is_floating_point() else value
        for key, value in safetensors.torch.load(content).items()
    }


def pretrained(name: str) -> nn.Module:
    """The shipped model with its weights, in eval mode.

    Raises:
        UnknownName: If no such weights are shipped.
        InvalidInput: If the file is not the one that its card describes.
    """
    made = card(name)
    model = build(made.model, **made.settings)
    apply_state(model, load_weights(name), source=name)
    return model.eval()


def save_weights(model: nn.Module, about: Card, folder: Path, *, half: bool = False) -> Card:
    """Write ``folder/NAME.safetensors`` and its card; the returned card has the file's SHA-256.

    Args:
        model: Whose parameters and buffers are written.
        about: The card; its ``sha256`` is replaced.
        folder: Where to.
        half: Store floating point tensors in float16.
    """
    state = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    content = safetensors.torch.save(state, metadata={"format": "pt", "name": about.name})
    values = {**asdict(about), "sha256": hashlib.sha256(content).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{about.name}.safetensors").write_bytes(content)
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    (folder / f"{about.name}.json").write_text(text, encoding="utf-8")
    return Card(**values)


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or ``torch.save`` file, by name, on the CPU.

    A file saved with ``torch.save`` is read with ``weights_only=True``; a state dict nested under
    "state_dict", "model_state_dict" or "model" is found.

    Raises:
        InvalidInput: If the file is missing, truncated, holds anything but plain tensors (such as
            code), or a value that is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidInput(f"{path}: there is no such file.")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the header's length (8 bytes) and the header, a JSON object.
    is_safetensors = path.suffix == ".safetensors" or start[8:] == b"{"
    loaded = _read_safetensors(path) if is_safetensors else _read_torch(path)
    return _plain_tensors(loaded, path)


def apply_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load ``state`` into ``model`` in place, all of it or nothing.

    Args:
        model: The model.
        state: Tensors by parameter and buffer name.
        source: Where they come from, for the message.

    Raises:
        InvalidInput: If names or shapes differ, or a value is not finite.
    """
    own = model.state_dict()
    missing, foreign = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or foreign:
        raise InvalidInput(
            f"{source}: not the weights of this {type(model).__name__}: "
            f"missing {_some(missing)}; not in the model: {_some(foreign)}."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InvalidInput(
                f"{source}: {key} has shape {tuple(value.shape)}; this {type(model).__name__} "
                f"expects {tuple(own[key].shape)}. Build the model with the settings (classes, "
                f"size, width) of the file."
            )
        _require_finite(key, value, source)
    model.load_state_dict(dict(state))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, LookupError) as problem:
        raise InvalidInput(
            f"{path}: not a readable safetensors file (truncated or damaged): {problem}"
        ) from None


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            # torch remarks on sparse and legacy files; what we refuse, we explain ourselves.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as problem:
        reason = str(problem).strip().splitlines() or [type(problem).__name__]
        raise InvalidInput(
            f"{path}: not a file of plain tensors ({reason[0][:200]}). It is damaged, or it holds "
            f"code or whole objects, which are never loaded. Save the weights alone: "
            f"safetensors.torch.save_file(model.state_dict(), PATH)."
        ) from None


def _plain_tensors(loaded: object, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for key in _WRAPPERS:
            if isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
                break
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "no tensor" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise InvalidInput(f"{path}: expected tensors by name (a state dict); found {kind}.")
    state: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InvalidInput(
                f"{path}: expected tensors by name; {key!r} is a {type(value).__name__}."
            )
        if value.layout != torch.strided or value.is_quantized:
            raise InvalidInput(f"{path}: {key} is sparse or quantised; save it as a dense tensor.")
        _require_finite(key, value, str(path))
        state[key] = value.detach()
    return state


def _require_finite(key: str, value: Tensor, source: str) -> None:
    if not bool(torch.isfinite(value).all()):
        bad = math.prod(value.shape) - int(torch.isfinite(value).sum())
        raise InvalidInput(
            f"{source}: {key} holds {bad} values that are not finite (of {value.numel()})."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
