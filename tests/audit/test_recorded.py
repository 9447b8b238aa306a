"""What a framework recorded is audited through YAML: the protocol comes with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional as F

from leakatlas.audit import examine, make_plan, presets, read_config
from leakatlas.data import ImageSet, photos
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import Exchange, Recorder
from leakatlas.fl.state import model_state
from leakatlas.models import build

LENET = {"size": 16, "classes": 8}
SETTINGS = {"learning-rate": 0.05, "local-epochs": 2, "batch-size": 2}


def record(folder: Path, *, images: ImageSet | None = None, **changes: object) -> None:
    """Two epochs of a client that holds two images: the first bundled photos."""
    net = build("lenet", **LENET)
    found = photos(16) if images is None else images
    x, y = found.images[:2], found.labels[:2]
    before = model_state(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    exchange = Exchange(
        round=4, client="site-1", place="raw", received=before, sent=model_state(net), examples=2,
        settings=SETTINGS,
    )  # fmt: skip
    Recorder(folder=folder).write(Exchange(**{**vars(exchange), **changes}))


def _yaml(path: Path, **changes: object) -> Path:
    content = {
        "model": {"builtin": "lenet", "kwargs": LENET},
        "data": {"victims": "photos:16", "limit": 2},
        "captured": "captures",
        "threat": "B",
        **changes,
    }
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))), encoding="utf-8")
    return path


def test_a_folder_brings_its_protocol(tmp_path: Path) -> None:
    record(tmp_path / "captures")
    config = read_config(_yaml(tmp_path / "audit.yaml"))
    plan = make_plan(config, base=tmp_path, command="")
    (setting,) = plan.settings
    assert setting.protocol == FedAVG(epochs=2, batch_size=2, lr=0.05)
    attacks = presets(("inverting_gradients",), {}, published=False)
    found = examine(setting.stage(letter="B", seed=0), attacks, letters=("B",))
    assert found.replay.residual is not None
    assert found.replay.residual < 1e-5
    assert any("taken in order" in finding for finding in found.findings)


def test_a_recorded_shuffle_is_no_assumption(tmp_path: Path) -> None:
    record(tmp_path / "captures", settings={**SETTINGS, "shuffle": True})
    config = read_config(_yaml(tmp_path / "audit.yaml"))
    (setting,) = make_plan(config, base=tmp_path, command="").settings
    assert setting.protocol == FedAVG(epochs=2, batch_size=2, lr=0.05, shuffle=True)
    assert not any("taken in order" in note for note in setting.weights_notes)


def test_what_is_unknown_is_asked_for_and_can_be_said(tmp_path: Path) -> None:
    record(tmp_path / "captures", settings={"lr": 0.05}, examples=None)
    config = read_config(_yaml(tmp_path / "audit.yaml"))
    with pytest.raises(InvalidInput, match="epochs, batch_size"):
        make_plan(config, base=tmp_path, command="")
    path = _yaml(
        tmp_path / "said.yaml",
        protocol={"epochs": 2, "batch_size": 2},
        captured={"folder": "captures", "examples": 2, "client": "site-1", "rounds": [4]},
    )
    (setting,) = make_plan(read_config(path), base=tmp_path, command="").settings
    assert setting.protocol == FedAVG(epochs=2, batch_size=2, lr=0.05)


def test_a_mode_that_nobody_recorded_is_an_assumption_where_it_matters(tmp_path: Path) -> None:
    """Where batch normalisation or dropout makes the modes differ, and only there."""

    def said(name: str, **kwargs: object) -> bool:
        net = build(name, **kwargs)
        before = model_state(net)
        after = {n: t + 0.01 if t.is_floating_point() else t for n, t in before.items()}
        folder = tmp_path / name
        record(folder / "captures", received=before, sent=after)
        path = _yaml(folder / "audit.yaml", model={"builtin": name, "kwargs": kwargs})
        (setting,) = make_plan(read_config(path), base=folder, command="").settings
        return any("train mode was not recorded" in note for note in setting.weights_notes)

    assert said("convnet-bn", size=16, classes=8)
    assert not said("lenet", **LENET)


def test_a_mean_is_of_as_many_clients_as_were_recorded(tmp_path: Path) -> None:
    record(tmp_path / "captures", place="aggregate", client="all", cohort=2, examples=4)
    path = _yaml(tmp_path / "audit.yaml", data={"victims": "photos:16", "limit": 4})
    (setting,) = make_plan(read_config(path), base=tmp_path, command="").settings
    assert setting.clients == 2
    assert setting.effective_vantage == "aggregate"
