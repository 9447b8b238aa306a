"""Weights: those shipped with the package, and those of a user's file.

Every shipped file ``weights/NAME.safetensors`` has a card ``weights/NAME.json`` that says where
it comes from; the weights are checked against the card's SHA-256 before use. A user's file is
untrusted: only plain tensors are read from it, never code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.errors import InvalidInput, UnknownName, shown
from leakatlas.models.fitting import Held, fit_state, some
from leakatlas.models.registry import build

WEIGHTS = Path(str(resources.files("leakatlas.models") / "weights"))

_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which trainers nest weights, taken first where several mappings hold tensors."""
_LEVELS = 4
"""How deep weights are looked for."""


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))
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
        seen: Name of the file with fingerprints of what a prior was trained on, if there is one.
        device: Where it was trained, as the system names it.
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
    seen: str = ""
    device: str = ""


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
    try:
        return read_card(WEIGHTS / f"{name}.json")
    except InvalidInput as problem:
        raise InvalidInput(f"{problem} Reinstall the package.") from None


def read_card(path: Path) -> Card:
    """The provenance card in a file; every value is of its type.

    Raises:
        InvalidInput: If it is none.
    """
    values = reading.read_json(path, what="provenance card")
    try:
        return TypeAdapter(Card).validate_python(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(
            f"{shown(str(path))}: not a provenance card: {where}: {first['msg']}."
        ) from None


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
    made = Card(**values)
    write_card(made, folder / f"{about.name}.json")
    return made


def write_card(about: Card, path: Path) -> None:
    """Write a card."""
    text = json.dumps(asdict(about), indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def load_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, by the names that it gives them; as :func:`read_state`."""
    return read_state(path).state


def load_for(model: nn.Module, weights: str | Path) -> Held:
    """Shipped weights, or those of a file, by the names of a model; see :func:`fit_state`.

    Raises:
        InvalidInput: If the file is unusable, or does not fit the model.
    """
    if str(weights) in shipped():
        return Held(load_weights(str(weights)))
    read = read_state(weights)
    fitted = fit_state(read.state, model, source=str(weights))
    return Held(fitted.state, (*read.notes, *fitted.notes))


def read_state(path: str | Path) -> Held:
    """The tensors of a safetensors or ``torch.save`` file, by name, on the CPU.

    A file saved with ``torch.save`` is read with ``weights_only=True``; the mapping of tensors may
    be nested in others: under "state_dict", "model_state_dict" or "model", or as the only one.

    Raises:
        InvalidInput: If the file is missing, truncated, holds anything but plain tensors (such as
            code), a value that is not finite, or several mappings of tensors.
    """
    path = Path(path)
    tensorfiles.require_room(path, what="weights")
    with reading.boundary(f"The weights {shown(str(path))}"), path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the header's length (8 bytes) and the header, a JSON object.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        loaded: object = tensorfiles.read_safetensors(path, what="weights")[0]
    else:
        loaded = tensorfiles.read_torch(path, what="weights")
    inner, keys = _innermost(loaded, path)
    notes = (f"{path}: the weights are those under {'/'.join(keys)}",) if keys else ()
    return Held(_plain_tensors(inner, path), notes)


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
            f"missing {some(missing)}; not in the model: {some(foreign)}."
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


def _innermost(loaded: object, path: Path) -> tuple[object, list[str]]:
    """The mapping that holds the tensors, and the keys that lead to it."""
    keys: list[str] = []
    while isinstance(loaded, Mapping) and len(keys) < _LEVELS:
        holders = [
            key
            for key, value in loaded.items()
            if isinstance(key, str) and isinstance(value, Mapping) and _holds_tensors(value)
        ]
        known = [key for key in _WRAPPERS if key in holders]
        if not known and any(isinstance(value, Tensor) for value in loaded.values()):
            break
        if len(holders) > 1 and not known:
            raise InvalidInput(
                f"{path}: several mappings hold tensors: {some(holders)}; save the one that is "
                "meant as a file of its own."
            )
        if not holders:
            break
        keys.append((known or holders)[0])
        loaded = loaded[keys[-1]]
    return loaded, keys


def _holds_tensors(content: Mapping[object, object], levels: int = _LEVELS) -> bool:
    """Whether names lead to a tensor; an optimiser's state is numbered."""
    return all(isinstance(key, str) for key in content) and any(
        isinstance(value, Tensor)
        or (isinstance(value, Mapping) and levels > 0 and _holds_tensors(value, levels - 1))
        for value in content.values()
    )


def _plain_tensors(loaded: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "no tensor" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise InvalidInput(f"{path}: expected tensors by name (a state dict); found {kind}.")
    state: dict[str, Tensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise InvalidInput(f"{path}: expected tensors by name; one is named {shown(key)}.")
        tensorfiles.require_plain(key, value, str(path))
        _require_finite(key, value, str(path))
        state[key] = value.detach()
    return state


def _require_finite(key: str, value: Tensor, source: str) -> None:
    if bad := tensorfiles.count_non_finite(value):
        raise InvalidInput(
            f"{source}: {key} holds {bad} values that are not finite (of {value.numel()})."
        )
