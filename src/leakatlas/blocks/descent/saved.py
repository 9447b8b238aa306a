"""Checkpoints of a descent: enough to go on exactly, in a file that holds no code."""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas import sealed

FORMAT = "leakatlas/descent/2"


def identity(start: Mapping[str, Tensor], steps: int, candidates: int | None) -> str:
    """What a checkpoint must share with the run that goes on from it: start, length, candidates."""
    digest = hashlib.sha256(f"{steps} {candidates}".encode())
    for name, tensor in start.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def save(file: Path, state: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Write a checkpoint; a run killed meanwhile keeps the one before.

    Without room on the disk the run goes on, and only its resuming is lost.
    """
    noise = {"global": torch.get_rng_state(), "own": [g.get_state() for g in generators]}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state, "noise": noise}, buffer)
    try:
        sealed.seal(file, buffer.getvalue())
    except OSError as problem:
        warnings.warn(
            f"The checkpoint {file} cannot be written ({problem.strerror}); a run that is killed "
            "now begins anew.",
            stacklevel=2,
        )


def load(file: Path, wanted: str, generators: Sequence[torch.Generator]) -> dict[str, Any] | None:
    """The checkpoint in ``file``; sets the generators to where they were.

    None if there is none, or if it is damaged or of another run: it is then discarded with a
    warning, and the descent begins anew.
    """
    content = sealed.unseal(file)
    if content is None:
        return None
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        sealed.discard(file, "it is not a checkpoint of a descent")
        return None
    if state["identity"] != wanted:
        sealed.discard(
            file, "it belongs to another run (another start, length or number of candidates)"
        )
        return None
    torch.set_rng_state(state["noise"]["global"])
    for generator, noise in zip(generators, state["noise"]["own"], strict=True):
        generator.set_state(noise)
    return dict(state)
