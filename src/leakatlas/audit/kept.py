"""Finished runs in the output folder: what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from leakatlas.audit.plan import Setting
from leakatlas.fl import model_state, state_hash
from leakatlas.report import Run


def identity(setting: Setting, target: int, recipe_hash: str) -> str:
    """The name of a run's files: what can change its result, hashed."""
    weights = state_hash(model_state(setting.model))
    box = json.dumps(setting.box.to_json())
    text = f"{recipe_hash}|{weights}|{target}|{box}|{setting.victims.fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def save(stem: Path, run: Run) -> None:
    """Write a finished run; a kill meanwhile leaves nothing half-written behind."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if run.pictures is not None:
        save_file({"pictures": run.pictures.contiguous()}, stem.with_suffix(".safetensors"))
    partial = stem.with_suffix(".partial")
    partial.write_text(json.dumps(run.to_json()), encoding="utf-8")
    os.replace(partial, stem.with_suffix(".json"))


def load(stem: Path) -> Run | None:
    """A finished run, or None if there is none or it is damaged (it is then run again)."""
    try:
        values = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        pictures = load_file(stem.with_suffix(".safetensors"))["pictures"]
        return Run.from_json(values, pictures)
    except (FileNotFoundError, json.JSONDecodeError, SafetensorError, KeyError, TypeError):
        return None
