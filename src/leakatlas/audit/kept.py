"""Finished runs in the output folder: what survives a kill, and what is not believed."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from leakatlas import sealed
from leakatlas.attacks.api import Attack, Recipe
from leakatlas.audit import process
from leakatlas.audit.plan import Plan, Setting
from leakatlas.catalogue.code import ALWAYS, code_hash
from leakatlas.errors import InvalidInput
from leakatlas.fl.losses import Loss, PythonLoss
from leakatlas.fl.state import held, state_hash
from leakatlas.report import Run

_DAMAGED: tuple[type[Exception], ...] = (*sealed.MALFORMED, SafetensorError)

LOCK = ".lock"
"""Held by the process that writes into a folder; the system frees it when that process dies."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other audits out of ``folder``.

    Raises:
        InvalidInput: At once, if another audit is writing there.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InvalidInput(
            f"Another audit is writing to {str(folder)!r}; wait until it has ended, or choose "
            "another folder with --out. Nothing was computed."
        ) from None
    token = _HASHED.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _HASHED.reset(token)
        lock.release()


_HASHED: ContextVar[WeakKeyDictionary[nn.Module, str] | None] = ContextVar("hashed", default=None)
"""Hashes of the models of the audit that is under way, which leaves them as they are: of a large
one it takes a second, and every run asks for it. A model that is gone leaves no hash to another."""


def _weights(model: nn.Module) -> str:
    known = _HASHED.get()
    if known is None:
        return state_hash(held(model))
    if model not in known:
        known[model] = state_hash(held(model))
    return known[model]


def recipe_of(setting: Setting, attack: Attack, scenario: dict[str, Any], plan: Plan) -> Recipe:
    """The recipe of a run, with all that can change its result on this machine."""
    plain = attack.recipe(plan.seed, scenario)
    conditions = {
        "threads": torch.get_num_threads(),
        "device": setting.device.type,
        "execution": plan.execution,
        "rehearsal": plan.rehearsal,
        "process": process.adversary(plan).process,
        "model source": source_hash(setting.model, setting.model_ref.name),
        "loss source": loss_hash(setting.protocol.loss),
        "code": code_hash([*ALWAYS, type(attack).__module__], _own_files(type(attack))),
    }
    return replace(plain, conditions=conditions)


def _own_files(attack: type[Attack]) -> list[Path]:
    """The file of an attack that comes from elsewhere."""
    if attack.__module__.partition(".")[0] == "leakatlas":
        return []
    return [Path(inspect.getfile(attack))]


def loss_hash(loss: Loss) -> str:
    """Hash of the user's file that a loss in Python code comes from; empty for the others."""
    if not isinstance(loss, PythonLoss) or loss.function is None:
        return ""
    try:
        return sealed.digest(Path(inspect.getfile(loss.function)).read_bytes())
    except (TypeError, OSError):  # typed at a prompt, or an object that is called
        return loss.name


def source_hash(model: nn.Module, name: str) -> str:
    """Hash of a model's structure and of the user's files that it comes from.

    Args:
        model: The live model.
        name: How its reference names it: ``file.py:factory``, ``package.module:factory``, ...
    """
    digest = hashlib.sha256(repr(model).encode())
    location = name.rpartition(":")[0]
    module = sys.modules.get(location)
    named = location if location.endswith(".py") else getattr(module, "__file__", None)
    files = set() if named is None else {Path(named)}
    for cls in {type(part) for part in model.modules()}:
        if cls.__module__.partition(".")[0] in ("torch", "torchvision", "leakatlas"):
            continue  # their versions and code are in the recipe
        try:
            files.add(Path(inspect.getfile(cls)))
        except (TypeError, OSError):  # typed at a prompt
            continue
    for file in sorted(files):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def identity(setting: Setting, target: int, recipe: Recipe) -> str:
    """The name of a run's files: what can change its result, hashed; its budget left out.

    A run that more time would prolong keeps its name, so that it goes on from its checkpoints;
    :func:`load` compares the budgets.
    """
    parts = [
        recipe.content_hash,
        recipe.versions,
        _weights(setting.model),
        target,
        setting.box.to_json(),
        *setting.fingerprints,
        None if setting.captured is None else setting.captured.fingerprint(),
    ]
    return sealed.digest(json.dumps(parts, sort_keys=True).encode())[:24]


def save(stem: Path, run: Run, budget: float | None) -> None:
    """Write a run with the digest of all that was written.

    Raises:
        OSError: If there is no room; what was there before is untouched.
    """
    pictures = b""
    if run.pictures is not None:
        pictures = safetensors.torch.save({"pictures": run.pictures.contiguous()})
        sealed.write_whole(stem.with_suffix(".safetensors"), pictures)
    content = {"budget": budget, "run": run.to_json(), "pictures": sealed.digest(pictures)}
    text = json.dumps({"sha256": _digest(content), **content}, indent=1)
    sealed.write_whole(stem.with_suffix(".json"), text.encode())


def forget(stem: Path) -> None:
    """Let go of a run, which is made again."""
    for suffix in (".json", ".safetensors"):
        stem.with_suffix(suffix).unlink(missing_ok=True)


def load(stem: Path, budget: float | None) -> Run | None:
    """A run that was tried to its end under the same budget, or None.

    What fails its digest, or is not of this format, is discarded with a warning. A run under
    another budget is made again; one that was cut short goes on from its checkpoints.
    """
    file, beside = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    try:
        content = json.loads(file.read_bytes())
        said = content.pop("sha256")
        pictured = content["pictures"] != sealed.digest(b"")
        pictures = beside.read_bytes() if pictured else b""
        if said != _digest(content) or content["pictures"] != sealed.digest(pictures):
            sealed.discard(file, "it fails its SHA-256")
            return None
        held = safetensors.torch.load(pictures)["pictures"] if pictures else None
        run = Run.from_json(content["run"], held)
    except FileNotFoundError as problem:
        if Path(str(problem.filename)) == beside:
            sealed.discard(file, "its pictures are missing")
        return None
    except _DAMAGED:
        sealed.discard(file, "it is no run as they are kept here")
        return None
    return run if run.tried and content["budget"] == budget else None


def _digest(content: dict[str, Any]) -> str:
    return sealed.digest(json.dumps(content, sort_keys=True).encode())
