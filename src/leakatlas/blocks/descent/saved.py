"""Checkpoints of a descent: enough to go on exactly, in a file that holds no code."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput

FORMAT = "leakatlas/descent/1"


def identity(start: Mapping[str, Tensor], steps: int, candidates: int | None) -> str:
    """What a checkpoint must share with the run that goes on from it: start, length, candidates."""
    digest = hashlib.sha256(f"{steps} {candidates}".encode())
    for name, tensor in start.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def save(file: Path, state: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Write a checkpoint; a run killed meanwhile keeps the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    noise = {"global": torch.get_rng_state(), "own": [g.get_state() for g in generators]}
    torch.save({"format": FORMAT, **state, "noise": noise}, partial)
    partial.replace(file)


def load(file: Path, wanted: str, generators: Sequence[torch.Generator]) -> dict[str, Any] | None:
    """The checkpoint in ``file``, or None; sets the generators to where they were.

    Raises:
        InvalidInput: If it is damaged, or of another run.
    """
    if not file.is_file():
        return None
    try:
        state = torch.load(file, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as problem:
        raise InvalidInput(
            f"The checkpoint {file} is damaged ({type(problem).__name__}); delete it to start anew."
        ) from problem
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InvalidInput(f"{file} is not a checkpoint of a descent; choose another folder.")
    if state["identity"] != wanted:
        raise InvalidInput(
            f"The checkpoint {file} belongs to another run (another start, length or number of "
            "candidates); delete it, or choose another folder."
        )
    torch.set_rng_state(state["noise"]["global"])
    for generator, noise in zip(generators, state["noise"]["own"], strict=True):
        generator.set_state(noise)
    return dict(state)
