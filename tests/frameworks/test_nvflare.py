"""The NVFlare filters against the real library: one by one, then in the simulator.

``make test-nvflare`` builds an environment with NVFlare and runs this file there.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leakatlas
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import read_recording

pytest.importorskip("nvflare", reason="make test-nvflare builds an environment with NVFlare")

APP = Path(__file__).parents[2] / "examples" / "nvflare"
PROTOCOL = FedAVG(epochs=1, batch_size=4, lr=0.05)


@pytest.fixture(autouse=True)
def app_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(APP))


def _net() -> Any:
    return importlib.import_module("net")


def _context(site: str = "site-1") -> Any:
    from nvflare.apis.fl_context import FLContextManager

    return FLContextManager(identity_name=site, job_id="job").new_context()


def _passed(filter_: Any, chain: str, data: dict[str, Any], context: Any, number: int = 0) -> Any:
    """A task's data, or its result, through one filter, as NVFlare calls it."""
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.filter import FilterChainType, FilterContextKey

    chains = {
        "data": FilterChainType.TASK_DATA_CHAIN, "result": FilterChainType.TASK_RESULT_CHAIN,
    }  # fmt: skip
    filter_.set_prop(FilterContextKey.CHAIN_TYPE, chains[chain])
    shareable = DXO(DataKind.WEIGHTS, data=data).to_shareable()
    shareable.set_header("current_round", number)
    return from_shareable(filter_.process(shareable, context))


def _state(model: Any) -> dict[str, Any]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def test_a_task_and_its_result_are_recorded_and_left_alone(tmp_path: Path) -> None:
    from leakatlas.integrations.nvflare import CaptureFilter

    net, context = _net(), _context()
    torch.manual_seed(0)
    model = net.Net()
    before = _state(model)
    arriving = _passed(CaptureFilter(str(tmp_path)), "data", before, context, 3)
    net.train(model, *net.load_data("site-1"))
    after = _state(model)
    leaving = _passed(CaptureFilter(str(tmp_path)), "result", after, context, 3)
    assert not arriving.get_filter_history()
    assert not leaving.get_filter_history()
    assert all((leaving.data[n] == after[n]).all() for n in after)

    recording = read_recording(tmp_path)
    assert (recording.last.round, recording.last.client) == (3, "site-1")
    torch.manual_seed(0)
    found = leakatlas.doctor(
        net.Net(), net.load_data("site-1"), protocol=PROTOCOL, threat="B",
        captured=recording.capture(net.Net(), examples=net.EXAMPLES),
    )  # fmt: skip
    assert found.replay.residual is not None
    assert found.replay.residual <= 1e-5


def test_a_tampered_model_is_blocked(tmp_path: Path) -> None:
    from nvflare.apis.filter import ContentBlockedException

    from leakatlas.integrations.nvflare import LintFilter

    net, context = _net(), _context()
    torch.manual_seed(0)
    honest, tampered = _state(net.Net()), _state(net.TamperedNet())
    assert _passed(LintFilter(), "data", honest, context).data.keys() == honest.keys()
    for filter_ in (LintFilter(), LintFilter(model="net:Net")):
        with pytest.raises(ContentBlockedException, match="refuses round 0"):
            _passed(filter_, "data", tampered, context)
    _passed(LintFilter(on_alarm="log"), "data", tampered, context)


def test_a_model_that_is_not_the_agreed_one_is_blocked() -> None:
    from nvflare.apis.filter import ContentBlockedException

    from leakatlas.integrations.nvflare import LintFilter

    state = _state(_net().Net()) | {"inserted.weight": torch.zeros(3, 3).numpy()}
    with pytest.raises(ContentBlockedException, match="cannot be examined"):
        _passed(LintFilter(model="net:Net"), "data", state, _context())


def test_arguments_that_make_no_sense_are_told(tmp_path: Path) -> None:
    from leakatlas.integrations.nvflare import CaptureFilter, LintFilter

    with pytest.raises(InvalidParameter, match="raw, wire or server"):
        CaptureFilter(str(tmp_path), place="aggregate")
    with pytest.raises(InvalidParameter, match="refuse or log"):
        LintFilter(on_alarm="shout")


def _job(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "job.py", str(tmp_path / "captures"),
            "--workspace", str(tmp_path / "workspace"), *options,
        ],
        cwd=APP, text=True, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{APP.parents[1] / 'src'}:{APP}"},
    )  # fmt: skip


def test_two_rounds_of_two_sites_in_the_simulator(tmp_path: Path) -> None:
    done = _job(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    net = _net()
    for site in ("site-1", "site-2"):
        recording = read_recording(tmp_path / "captures", client=site)
        assert [e.round for e in recording.exchanges] == [0, 1]
        assert recording.last.settings == {"steps": 2}
        found = leakatlas.doctor(
            net.Net(), net.load_data(site), protocol=PROTOCOL, threat="B",
            captured=recording.capture(net.Net(), examples=net.EXAMPLES),
        )  # fmt: skip
        assert found.replay.residual is not None
        assert found.replay.residual <= 1e-5, site


def test_a_tampered_job_is_refused_by_its_sites(tmp_path: Path) -> None:
    done = _job(tmp_path, "--tamper", "--rounds", "1")
    said = done.stdout + done.stderr
    assert "refuses round 0" in said, said[-3000:]
    assert not list((tmp_path / "captures").glob("*/*.json")), "nobody trained on it"
