"""What travels in a round: updates, views, tamperings, described scenarios."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from leakatlas import models
from leakatlas.audit.intake import read_capture
from leakatlas.fl import FedAVG, ModelRef, Scenario, Tampering, Update, View, stage
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.edits import Imprint, SplitImprint
from leakatlas.fl.tampering import TamperedModel
from leakatlas.threat import Grant
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import Files, door, one
from tests.doors.seeds import safetensors_file, saved, update_of_a_client, views


@door(
    one(
        "update.safetensors",
        safetensors_file(
            lambda f: update_of_a_client().save(f / "u.safetensors"), "leakatlas.update"
        ),
    ),
    share=2.0,
)
def update(folder: Path) -> object:
    """A captured update."""
    found = Update.load(folder / "update.safetensors")
    return found.check_fits(dict(views()[0].model.named_parameters()))


def _view_files() -> st.SearchStrategy[Files]:
    def both(text: bytes, tensors: bytes) -> Files:
        return {"view.json": text, "view.safetensors": tensors}

    ways: list[st.SearchStrategy[Files]] = []
    for made in views():
        with tempfile.TemporaryDirectory() as folder:
            made.save(folder)
            text = (Path(folder) / "view.json").read_bytes()
            tensors = (Path(folder) / "view.safetensors").read_bytes()
        description = json.loads(text)
        code = {"kind": "python", "name": "os:mkdir", "kwargs": {"path": hostile.CANARY}}
        changed = tampered((description, {**description, "model": code})).map(as_json)
        ways += [
            st.builds(both, st.one_of(changed, damaged((text,))), st.just(tensors)),
            st.builds(both, st.just(text), safetensors_file(made.save, None)),
        ]
    return st.one_of(*ways)


@door(_view_files(), share=3.0)
def view(folder: Path) -> object:
    """A saved view."""
    found = View.load(folder)
    return found.model if found.has("rounds") else found


def _tampering() -> Tampering:
    imprint = Imprint(w=torch.ones(192), edges=torch.arange(4.0))
    split = SplitImprint(
        w=torch.ones(192), edges=torch.arange(4.0), shape=(3, 8, 8), clients=2, group=0, kappa=1.0
    )
    models_sent = {
        0: TamperedModel(weights={"fc.bias": torch.zeros(10)}, edits=(imprint,)),
        1: TamperedModel(edits=(split,)),
    }
    return Tampering(sent=models_sent, key={"k": torch.ones(2)})


@door(
    one(
        "t.safetensors",
        safetensors_file(lambda f: _tampering().save(f / "t.safetensors"), "leakatlas.tampering"),
    )
)
def tampering(folder: Path) -> object:
    """What a malicious server sends, built as its client would."""
    found = Tampering.load(folder / "t.safetensors")
    agreed = models.build("fc", size=8, widths=[3])
    sent = found.sent if isinstance(found.sent, Mapping) else {0: found.sent}
    return [model.build(agreed, pixels=192) for model in sent.values()]


SCENARIO = Scenario(
    model=ModelRef("builtin", "fc", {"size": 8, "widths": [4]}),
    data="photos:8",
    surrogate="patches:8:8:surrogate",
    letter="D",
    protocol=FedAVG(),
    grants=frozenset(Grant),
).to_json()
CODE = {
    **SCENARIO,
    "model": {"kind": "python", "name": "os:mkdir", "kwargs": {"path": hostile.CANARY}},
}


@door(one("scenario.json", tampered((SCENARIO, CODE)).map(as_json)))
def scenario(folder: Path) -> object:
    """A described scenario, brought to life."""
    values = json.loads((folder / "scenario.json").read_text("utf-8", "surrogatepass"))
    return stage(Scenario.from_json(values))


def _capture() -> Capture:
    made = views()[0]
    before = {**dict(made.model.named_parameters()), **dict(made.model.named_buffers())}
    one = CapturedRound(update=made.update, received={n: t.detach() for n, t in before.items()})
    return Capture(rounds=(one, one), notes=("by hand",))


@door(
    one(
        "c.safetensors",
        safetensors_file(lambda f: _capture().save(f / "c.safetensors"), "leakatlas.capture"),
    ),
    share=2.0,
)
def capture(folder: Path) -> object:
    """A capture of a real system."""
    return Capture.load(folder / "c.safetensors").fitted(views()[0].model)


def _arrays() -> dict[str, tuple[bytes, ...]]:
    state = {n: t.numpy() for n, t in views()[0].model.state_dict().items()}
    exotic: list[Any] = [
        {**state, "fc.bias": np.zeros(10, dtype="datetime64[s]")},
        {**state, "fc.bias": np.zeros(10, dtype="complex128")},
        {**state, "fc.bias": np.array(["x"] * 10)},
        {**state, "fc.bias": np.zeros(10, dtype=[("a", "f4")])},
        {**state, "fc.bias": np.full(10, np.nan)},
        {**state, "fc.bias": np.float64(1.0)},
        {"a": np.array([{}], dtype=object)},
    ]
    archives: list[bytes] = []
    for held in (state, *exotic):
        for write in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            write(buffer, **held)
            archives.append(buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, *state.values())
    archives.append(buffer.getvalue())
    tensors = {n: torch.from_numpy(a) for n, a in state.items()}
    values: tuple[Any, ...] = (
        tensors,
        list(tensors.values()),
        [1.0, None],
        {"a": {"b": {}}},
        {"a": tensors},
    )
    plain = [saved(value) for value in values]
    return {"a.npz": tuple(archives), "a.pt": tuple(plain)}


def _array_files() -> st.SearchStrategy[Files]:
    return st.one_of(
        *(
            one(name, st.one_of(damaged(files), st.sampled_from(files)))
            for name, files in _arrays().items()
        )
    )


@door(_array_files(), share=2.0)
def captured_arrays(folder: Path) -> object:
    """``leakatlas capture a.npz --model builtin:fc``."""
    model = views()[0].model
    (path,) = folder.iterdir()
    return read_capture([path], model, num_examples=2, kind="weights").fitted(model)
