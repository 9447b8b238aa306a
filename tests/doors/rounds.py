"""What travels in a round: updates, views, tamperings, described scenarios."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import strategies as st

from leakatlas import models
from leakatlas.fl import FedAVG, ModelRef, Scenario, Tampering, Update, View, stage
from leakatlas.fl.edits import Imprint, SplitImprint
from leakatlas.fl.tampering import TamperedModel
from leakatlas.threat import Grant
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import Files, door, one
from tests.doors.seeds import safetensors_file, update_of_a_client, views


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
