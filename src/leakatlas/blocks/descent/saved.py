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
from leakatlas.blocks.descent.execution import EXECUTIONS

FORMAT = "leakatlas/descent/2"

_UNREADABLE: tuple[type[Exception], ...] = (*sealed.MALFORMED, pickle.UnpicklingError)


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


def load(
    file: Path,
    wanted: str,
    generators: Sequence[torch.Generator],
    start: Mapping[str, Tensor],
    candidates: int | None,
) -> dict[str, Any] | None:
    """The checkpoint in ``file``; sets the generators to where they were.

    None if there is none, or if it is damaged or of another run: it is then discarded with a
    warning, and the descent begins anew.
    """
    content = sealed.unseal(file)
    if content is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign files; we discard them
            state = torch.load(io.BytesIO(content), weights_only=True)
    except _UNREADABLE:
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        sealed.discard(file, "it is not a checkpoint of a descent")
        return None
    if state.get("identity") != wanted:
        sealed.discard(
            file, "it belongs to another run (another start, length or number of candidates)"
        )
        return None
    try:
        _require_whole(state, start, () if candidates is None else (candidates,))
        # Tried on generators of no importance first, so that it is all of them or none.
        own = [torch.Generator(g.device).set_state(noise)
               for g, noise in zip(generators, state["noise"]["own"], strict=True)]  # fmt: skip
        torch.set_rng_state(state["noise"]["global"])
    except sealed.MALFORMED:
        sealed.discard(file, "it lacks a part of a checkpoint, or a part is of another kind")
        return None
    for generator, noise in zip(generators, own, strict=True):
        generator.set_state(noise.get_state())
    return dict(state)


def _require_whole(
    state: Mapping[str, Any], start: Mapping[str, Tensor], shape: tuple[int, ...]
) -> None:
    """Refuse what no descent from ``start`` has left; the optimizer judges its own part."""
    for part in ("leaves", "best"):
        held = state[part]
        if held.keys() != start.keys() or any(not _alike(held[n], start[n]) for n in start):
            raise ValueError(part)
    like = next(iter(start.values()))
    criterion = torch.empty(shape, dtype=like.dtype)
    trace = state["trace"]
    if not all(_alike(value, criterion) for value in (state["lowest"], *trace)):
        raise ValueError("criterion")
    if not _alike(state["alive"], criterion.bool()):
        raise ValueError("alive")
    if type(state["steps"]) is not int or state["steps"] < 0:
        raise ValueError("steps")
    if type(state["finished"]) is not bool or type(state["undecided"]) is not bool:
        raise ValueError("finished")
    if state["finished"] and not trace:
        raise ValueError("trace")
    if type(trace) is not list or state["execution"] not in EXECUTIONS:
        raise ValueError("execution")
    if type(state["optimizer"]) is not dict:
        raise ValueError("optimizer")


def _alike(tensor: object, like: Tensor) -> bool:
    return (
        type(tensor) is Tensor and tensor.layout == torch.strided
        and (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    )  # fmt: skip
