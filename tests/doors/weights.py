"""Models of strangers."""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from leakatlas import data, models
from leakatlas.fl import load_into
from leakatlas.lint import lint
from tests.doors import hostile
from tests.doors.hostile import damaged
from tests.doors.registry import door, one
from tests.doors.seeds import safetensors_file, saved


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (hostile.CANARY,)


@functools.cache
def _states() -> tuple[dict[str, Tensor], ...]:
    small = models.build("fc", size=8, widths=[3]).state_dict()
    return (small, models.build("lenet", size=8, width=2).state_dict())


def _weights() -> tuple[bytes, ...]:
    small, lenet = _states()
    exotic: list[Any] = [
        {"w": torch.zeros(1).expand(10**12)},
        {"w": torch.zeros(3, device="meta")},
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.zeros(3, dtype=torch.complex64)},
        {"w": torch.zeros(3, dtype=torch.uint8).view(torch.bits8)},
        {"w": torch.tensor(0.0)},
        {n: t.to(torch.int8) for n, t in small.items()},
        {"state_dict": small},
        {n: t.to(torch.float8_e4m3fn) for n, t in small.items()},
        {"model": {"model": small}},
        {n: t.to(torch.bfloat16) for n, t in small.items()},
        {"w": torch.zeros(0, 5)},
        [small["fc.weight"]],
        {1: small["fc.weight"]},
        small["fc.weight"],
        {"a\x1b[2J": 3},
    ]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(10**6))
    return (
        *map(saved, (small, lenet, *exotic)),
        save(small),
        save(lenet),
        bomb.getvalue(),
        pickle.dumps({"w": _Payload()}),
        pickle.dumps({"w": _Payload()}, protocol=0),
    )


def _any_weights() -> st.SearchStrategy[bytes]:
    valid = _weights()
    return st.one_of(
        damaged(valid),
        st.sampled_from(valid),
        safetensors_file(lambda f: (f / "m.safetensors").write_bytes(save(_states()[0])), None),
    )


@door(one("w.pt", _any_weights()), share=2.0)
def weights(folder: Path) -> object:
    """Weights of a stranger."""
    return models.load_state(folder / "w.pt")


@st.composite
def _live(draw: st.DrawFn) -> bytes:
    """States whose values no file check refuses."""
    state = {n: t.clone() for n, t in draw(st.sampled_from(_states())).items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        tensor = state[name]
        dtype = draw(
            st.sampled_from(
                (
                    torch.float64,
                    torch.float32,
                    torch.float16,
                    torch.bfloat16,
                    torch.int8,
                    torch.bool,
                    torch.float8_e4m3fn,
                    torch.float8_e5m2,
                    torch.int64,
                )
            )
        )
        match draw(st.sampled_from(("scale", "dtype", "zero", "shape", "lose", "rename"))):
            case "scale":
                state[name] = tensor.double() * draw(st.sampled_from((1e-300, 1e-30, 1e30, 1e300)))
            case "dtype":
                state[name] = tensor.to(dtype)
            case "zero":
                state[name] = torch.zeros_like(tensor)
            case "shape":
                state[name] = tensor.reshape(-1)[: draw(st.integers(0, 5))]
            case "lose" if len(state) > 1:
                del state[name]
            case "rename":
                state[draw(st.sampled_from(("", "[/x]", "a.b.c", "\x1b[2J", name + "_orig")))] = (
                    state.pop(name)
                )
    return saved(state)


@door(one("w.pt", st.one_of(_live(), _live(), _any_weights())), share=2.0, examples=100)
def lint_weights(folder: Path) -> object:
    """``leakatlas lint w.pt``, by its function."""
    return lint(models.load_state(folder / "w.pt"))


@door(one("w.pt", st.one_of(_live(), _live(), _any_weights())), share=1.0, examples=60)
def received_model(folder: Path) -> object:
    """Weights that are put into the agreed architecture, and its check on one's own batch."""
    weights = models.load_state(folder / "w.pt")
    model = load_into(models.build("fc", size=8, widths=[3]), weights)
    return lint(model, batch=data.load("photos:8", limit=2))
