"""A view as files: plain values in ``view.json``, tensors in ``view.safetensors``.

No code, no pickle, no private tensor. What is read is data: code that a file names is run only if
the caller says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput, shown
from leakatlas.fl import state
from leakatlas.fl.granted import Distribution, RoundView
from leakatlas.fl.losses import Loss, as_loss, with_code
from leakatlas.fl.plain import (
    defense_from_json,
    defense_json,
    protocol_from_json,
    protocol_json,
)
from leakatlas.fl.state import ModelRef
from leakatlas.fl.update import Update
from leakatlas.threat import Grant, Vantage

FORMAT = "leakatlas/view/1"

FINITE = ("distribution/", "batch_bn/")
"""Fields of a saved view, besides states, updates and images, in which every value is finite."""


def write(
    folder: Path,
    description: Mapping[str, Any],
    fields: Mapping[str, Any],
    architecture: nn.Module,
) -> None:
    """Write both files.

    Args:
        folder: Made if it is missing.
        description: Plain values beside the fields.
        fields: By name.
        architecture: Its state and constants are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, facts = pack(fields)
    for name, tensor in state.model_state(architecture).items():
        tensors[f"architecture/{name}"] = tensor
    whole = {
        "format": FORMAT,
        **description,
        "mode": "train" if architecture.training else "eval",
        "constants": sorted(n for n, p in architecture.named_parameters() if not p.requires_grad),
        "fields": facts,
    }
    # Copies: safetensors refuses tensors that share memory.
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()},
              folder / "view.safetensors")  # fmt: skip
    (folder / "view.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a saved view.

    Raises:
        InvalidInput: If a file is missing, truncated, or not a view.
    """
    for part in ("view.json", "view.safetensors"):
        if not reading.is_file(folder / part):
            raise InvalidInput(f"{shown(str(folder))} is not a saved view: {part} is missing.")
    description = reading.read_json(folder / "view.json", what="view")
    tensors = tensorfiles.read_safetensors(folder / "view.safetensors", what="view")[0]
    if not isinstance(description, dict):
        raise InvalidInput(f"{folder / 'view.json'} is not the description of a view.")
    if description.get("format") != FORMAT:
        raise InvalidInput(
            f"{folder / 'view.json'} has format {shown(description.get('format'))}, "
            f"expected {FORMAT!r}."
        )
    return description, tensors


def rebuild(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    model: nn.Module | None,
    loss: Loss | None,
    trust_code: bool,
    device: torch.device | None,
) -> dict[str, Any]:
    """The arguments of the view that a description and its tensors make; see ``View.load``."""
    reference = ModelRef.from_json(description["model"])
    architecture = model if model is not None else reference.build(trust_code=trust_code)
    defenses = [defense_from_json(d) for d in description["architecture_defenses"]]
    with torch.random.fork_rng(devices=[]):  # what is initialised here is overwritten below
        for defense in defenses:
            architecture = defense.model(architecture)
    prefix = "architecture/"
    architecture = state.load_into(
        architecture if device is None else architecture.to(device),
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
    )
    architecture.train(description["mode"] == "train")
    constants = set(description["constants"])
    for name, parameter in architecture.named_parameters():
        parameter.requires_grad_(name not in constants)
    for path, tensor in tensors.items():
        if path.startswith(FINITE) and tensorfiles.count_non_finite(tensor):
            raise InvalidInput(f"The view holds values at {shown(path)} that are not finite.")
    fields = _unpack(description["fields"], tensors)
    if loss is None and trust_code:
        loss = with_code(as_loss(description["loss"]), Path())
    if loss is not None and "protocol" in fields:
        fields["protocol"] = replace(fields["protocol"], loss=loss)
    return {
        "letter": description["letter"],
        "vantage": Vantage.named(description["vantage"]),
        "grants": frozenset(Grant.named(grant) for grant in description["grants"]),
        "fields": fields,
        "architecture": architecture,
        "model_ref": reference,
        "loss": as_loss(description["loss"]) if loss is None else loss,
        "architecture_defenses": defenses,
    }


def pack(fields: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fields as tensors by path, and plain values by field."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}

    def put(path: str, group: Mapping[str, Tensor]) -> None:
        tensors.update({f"{path}/{name}": tensor for name, tensor in group.items()})

    def put_update(path: str, update: Update | None) -> Any:
        if update is None:
            return None
        content, description = update.pack()
        put(path, content)
        return description

    for name, value in fields.items():
        match name:
            case "rounds":
                facts[name] = []
                for number, seen in enumerate(value):
                    path = f"rounds/{number}"
                    put(f"{path}/state", seen.state)
                    put(f"{path}/payload", seen.payload)
                    put(f"{path}/key", seen.key)
                    facts[name].append(
                        {
                            "index": seen.index,
                            "cohort": seen.cohort,
                            "hidden_by": seen.hidden_by,
                            "update": put_update(f"{path}/update", seen.update),
                            "own": put_update(f"{path}/own", seen.own),
                        }
                    )
            case "others":
                facts[name] = [
                    {
                        str(client): put_update(f"others/{number}/{client}", update)
                        for client, update in updates.items()
                    }
                    for number, updates in enumerate(value)
                ]
            case "num_examples" | "classes" | "target":
                facts[name] = int(value)
            case "input_shape" | "clients":
                facts[name] = list(value)
            case "box":
                facts[name] = value.to_json()
            case "protocol":
                facts[name] = protocol_json(value)
            case "defenses":
                facts[name] = [defense_json(defense) for defense in value]
            case "surrogate":
                put(name, {"images": value.images, "labels": value.labels})
                facts[name] = {"classes": list(value.classes), "name": value.name}
            case "distribution":
                put(name, vars(value))
                facts[name] = {}
            case "labels":
                put(name, {"labels": value})
                facts[name] = {}
            case "key" | "secrets":
                put(name, value)
                facts[name] = {}
            case "batch_bn":
                for layer, (mean, variance) in value.items():
                    put(name, {f"{layer}:mean": mean, f"{layer}:variance": variance})
                facts[name] = list(value)
            case "batch_order":
                put(name, {str(step): indices for step, indices in enumerate(value)})
                facts[name] = len(value)
            case "augmentation":
                facts[name] = list(value)
            case "dropout_masks":
                put(name, {f"{s}/{i}": t for s, step in enumerate(value)
                           for i, t in enumerate(step)})  # fmt: skip
                facts[name] = [len(step) for step in value]
    return tensors, facts


def _unpack(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    groups = _groups(tensors)

    def take(path: str) -> dict[str, Tensor]:
        return dict(groups.get(path, {}))

    def take_update(path: str, description: Mapping[str, Any] | None) -> Update | None:
        return None if description is None else Update.unpack(take(path), description).check()

    fields: dict[str, Any] = {}
    for name, value in facts.items():
        match name:
            case "rounds":
                fields[name] = tuple(
                    RoundView(
                        index=seen["index"],
                        state=take(f"rounds/{number}/state"),
                        cohort=seen["cohort"],
                        update=take_update(f"rounds/{number}/update", seen["update"]),
                        hidden_by=seen["hidden_by"],
                        payload=take(f"rounds/{number}/payload"),
                        own=take_update(f"rounds/{number}/own", seen["own"]),
                        key=take(f"rounds/{number}/key"),
                    )
                    for number, seen in enumerate(value)
                )
            case "others":
                fields[name] = tuple(
                    {
                        int(client): update
                        for client, description in updates.items()
                        if (update := take_update(f"others/{number}/{client}", description))
                    }
                    for number, updates in enumerate(value)
                )
            case "num_examples" | "classes" | "target":
                fields[name] = int(value)
            case "input_shape" | "clients":
                fields[name] = tuple(value)
            case "box":
                fields[name] = Box.from_json(value)
            case "protocol":
                fields[name] = protocol_from_json(value)
            case "defenses":
                fields[name] = tuple(defense_from_json(defense) for defense in value)
            case "surrogate":
                content = take(name)
                fields[name] = ImageSet(
                    images=content["images"],
                    labels=content["labels"],
                    classes=tuple(value["classes"]),
                    name=value["name"],
                )
            case "distribution":
                fields[name] = Distribution(**take(name))
            case "labels":
                fields[name] = take(name)["labels"]
            case "key" | "secrets":
                fields[name] = take(name)
            case "batch_bn":
                content = take(name)
                fields[name] = {
                    layer: (content[f"{layer}:mean"], content[f"{layer}:variance"])
                    for layer in value
                }
            case "batch_order":
                content = take(name)
                fields[name] = tuple(content[str(step)] for step in range(value))
            case "augmentation":
                fields[name] = tuple(map(int, value))
            case "dropout_masks":
                content = take(name)
                fields[name] = tuple(
                    tuple(content[f"{step}/{i}"] for i in range(count))
                    for step, count in enumerate(value)
                )
            case _:
                raise InvalidInput(f"A view has no field {shown(name)}.")
    return fields


def _groups(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors under each of the paths that :func:`pack` makes (three parts at most)."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        parts = path.split("/", 3)
        for depth in range(1, len(parts)):
            groups.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth:])] = tensor
    return groups
