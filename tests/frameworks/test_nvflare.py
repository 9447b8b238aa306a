"""The NVFlare filters against the real library: one by one, then in the simulator.

``make test-nvflare`` builds an environment with NVFlare and runs this file there.
"""

from __future__ import annotations

import importlib
import json
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
TASK = APP.parent / "flower"
"""Where the task of the examples is, which both frameworks train."""

PROTOCOL = FedAVG(epochs=1, batch_size=4, lr=0.05)


@pytest.fixture(autouse=True)
def app_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TASK))
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
    net.train_site(model, *net.site_data("site-1"))
    after = _state(model)
    leaving = _passed(CaptureFilter(str(tmp_path)), "result", after, context, 3)
    assert not arriving.get_filter_history()
    assert not leaving.get_filter_history()
    assert all((leaving.data[n] == after[n]).all() for n in after)

    recording = read_recording(tmp_path)
    assert (recording.last.round, recording.last.client) == (3, "site-1")
    torch.manual_seed(0)
    found = leakatlas.doctor(
        net.Net(), net.site_data("site-1"), protocol=PROTOCOL, threat="B",
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


@pytest.mark.parametrize(
    ("dressed", "words"),
    [
        ("failed", "looks tampered with"),
        ("change", "only whole weights can be judged"),
        ("bare", "no data exchange object"),
        ("beside", "arrays stand beside the model"),
        ("meta", "arrays stand beside the model"),
        ("nested", "more than arrays"),
    ],
)
def test_a_server_cannot_dress_a_model_so_that_it_passes(dressed: str, words: str) -> None:
    """NVFlare's own base class lets all of these through unseen."""
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.filter import ContentBlockedException
    from nvflare.apis.shareable import Shareable

    from leakatlas.integrations.nvflare import LintFilter

    net = _net()
    torch.manual_seed(0)
    honest, tampered = _state(net.Net()), _state(net.TamperedNet())
    content: dict[str, Any] = {"collection": tampered} if dressed == "nested" else tampered
    kind = DataKind.WEIGHT_DIFF if dressed == "change" else DataKind.WEIGHTS
    shareable = DXO(kind, data=content).to_shareable()
    if dressed == "failed":
        shareable.set_return_code("EXECUTION_EXCEPTION")
    elif dressed == "bare":
        shareable = Shareable({"model": tampered})
    elif dressed == "beside":
        shareable = DXO(DataKind.WEIGHTS, data=honest).to_shareable()
        shareable["model"] = tampered
    elif dressed == "meta":
        meta = {"model": tampered}
        shareable = DXO(DataKind.WEIGHTS, data=honest, meta=meta).to_shareable()
    with pytest.raises(ContentBlockedException, match=words):
        LintFilter().process(shareable, _context())


def test_a_task_without_arrays_passes() -> None:
    from nvflare.apis.shareable import Shareable

    from leakatlas.integrations.nvflare import LintFilter

    task = Shareable({"ask": ["loss", 3]})
    task.set_header("current_round", 1)
    assert LintFilter().process(task, _context()) is task


def test_a_model_larger_than_the_limit_costs_no_memory_and_is_told(tmp_path: Path) -> None:
    import resource

    from leakatlas.integrations.nvflare import CaptureFilter

    megabytes, context = 200, _context()
    big = {"weight": torch.zeros(megabytes * 2**18).numpy()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for chain in ("data", "result"):
        _passed(CaptureFilter(str(tmp_path), limit_mb=1.0), chain, big, context)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < megabytes / 2, f"{grown:.0f} MiB more for an exchange that is not recorded"
    (facts,) = tmp_path.glob("*/*.json")
    assert "pass the limit" in facts.read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_only_chosen_rounds_and_sites_are_recorded(tmp_path: Path) -> None:
    from leakatlas.integrations.nvflare import CaptureFilter

    state = _state(_net().Net())
    for site in ("site-1", "site-2"):
        context = _context(site)
        for number in (0, 1, 2):
            for chain in ("data", "result"):
                chosen = CaptureFilter(str(tmp_path), rounds=[1], clients=["site-2"])
                _passed(chosen, chain, state, context, number)
    recorded = sorted(path.parent.name + "/" + path.name for path in tmp_path.glob("*/*.json"))
    assert recorded == ["round-00001/raw-site-2.json"]


def test_a_result_is_paired_with_its_own_task_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A site's filters see all tasks: one asks for the best model and brings none."""
    from nvflare.apis.fl_constant import FLContextKey

    from leakatlas.integrations.nvflare import CaptureFilter

    state, context = _state(_net().Net()), _context()

    def begin(task: str) -> None:
        context.set_prop(FLContextKey.TASK_ID, task, private=True, sticky=False)

    begin("train")
    _passed(CaptureFilter(str(tmp_path)), "data", state, context, 1)
    moved = {name: value + 1 for name, value in state.items()}
    _passed(CaptureFilter(str(tmp_path)), "result", moved, context, 1)
    begin("submit_model")
    _passed(CaptureFilter(str(tmp_path)), "result", state, context, 1)
    assert "no data of its task passed here" in caplog.text
    last = read_recording(tmp_path).last
    assert all((last.sent[n].numpy() == value).all() for n, value in moved.items())

    # What cannot be read is not answered by the round before.
    begin("again")
    _passed(CaptureFilter(str(tmp_path)), "data", {"weight": "text"}, context, 2)
    _passed(CaptureFilter(str(tmp_path)), "result", state, context, 2)
    assert "round 2 of client site-1, since what arrived cannot be read" in caplog.text
    assert [e.round for e in read_recording(tmp_path).exchanges] == [1]


def test_arguments_that_make_no_sense_are_told(tmp_path: Path) -> None:
    from leakatlas.integrations.nvflare import CaptureFilter, LintFilter

    with pytest.raises(InvalidParameter, match="raw, wire or server"):
        CaptureFilter(str(tmp_path), place="aggregate")
    with pytest.raises(InvalidParameter, match="refuse or log"):
        LintFilter(on_alarm="shout")


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{APP.parents[1] / 'src'}:{APP}:{TASK}",
    }


def _job(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "job.py", str(tmp_path / "captures"),
            "--workspace", str(tmp_path / "workspace"), *options,
        ],
        cwd=APP, text=True, capture_output=True, check=False,
        env=_environment(),
    )  # fmt: skip


def test_two_rounds_of_two_sites_in_the_simulator(tmp_path: Path) -> None:
    done = _job(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    net = _net()
    for site in ("site-1", "site-2"):
        recording = read_recording(tmp_path / "captures", client=site, place="raw")
        assert [e.round for e in recording.exchanges] == [0, 1]
        assert recording.last.settings == {"steps": 2}
        found = leakatlas.doctor(
            net.Net(), net.site_data(site), protocol=PROTOCOL, threat="B",
            captured=recording.capture(net.Net(), examples=net.EXAMPLES),
        )  # fmt: skip
        assert found.replay.residual is not None
        assert found.replay.residual <= 1e-5, site
        server = read_recording(tmp_path / "captures", client=site, place="server")
        assert [e.round for e in server.exchanges] == [0, 1]
        for raw, seen in zip(recording.exchanges, server.exchanges, strict=True):
            assert all(torch.equal(t, seen.received[n]) for n, t in raw.received.items())
            assert all(torch.equal(t, seen.sent[n]) for n, t in raw.sent.items())


def test_a_tampered_job_is_refused_by_its_sites(tmp_path: Path) -> None:
    done = _job(tmp_path, "--tamper", "--rounds", "1")
    said = done.stdout + done.stderr
    assert "refuses round 0" in said, said[-3000:]
    assert not list((tmp_path / "captures").glob("*/*.json")), "nobody trained on it"


def test_a_job_in_json_names_the_filters(tmp_path: Path) -> None:
    """As somebody writes it by hand: no recipe and no job API, and arguments in JSON."""
    written = (
        "from job import fed_job\n"
        "job = fed_job('', tamper=True, opt_out=True)\n"
        f"job.export_job({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", written], cwd=APP, check=True, env=_environment())
    described = tmp_path / "captured" / "app" / "config" / "config_fed_client.json"
    content = json.loads(described.read_text(encoding="utf-8"))
    lint = {
        "path": "leakatlas.integrations.nvflare.LintFilter",
        "args": {"model": "net:Net", "on_alarm": "log"},
    }
    record = {
        "path": "leakatlas.integrations.nvflare.CaptureFilter",
        "args": {"folder": str(tmp_path / "captures")},
    }
    content["task_data_filters"] = [{"tasks": ["train"], "filters": [lint, record]}]
    content["task_result_filters"] = [{"tasks": ["train"], "filters": [record]}]
    described.write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(
        ["nvflare", "simulator", str(tmp_path / "captured"), "-n", "2", "-w", str(tmp_path / "w")],
        text=True, capture_output=True, check=False, env=_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "refuses round 0: the received model looks tampered with" in done.stdout + done.stderr
    # Logged and gone on: of those whom the server waited for, the exchange is there.
    recorded = {path.name for path in (tmp_path / "captures").glob("*/*.json")}
    assert recorded
    assert recorded <= {"raw-site-1.json", "raw-site-2.json"}


def test_the_policy_of_a_site_holds_where_a_job_opts_out(tmp_path: Path) -> None:
    """A real server and two sites; one has the policy, and the run goes on without it."""
    done = subprocess.run(
        [
            sys.executable, "federation.py", str(tmp_path), "--tamper", "--opt-out",
            "--guarded", "site-1", "--scope", "", "--scope", "elsewhere",
        ],
        cwd=APP, text=True, capture_output=True, check=False, env=_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sites = tmp_path / "poc" / "example_project" / "prod_00"
    logs = {
        site: "".join(p.read_text(encoding="utf-8") for p in (sites / site).rglob("log.txt"))
        for site in ("site-1", "site-2")
    }
    assert "Client site-1 refuses round 0" in logs["site-1"]
    assert "refuses" not in logs["site-2"]
    guarded, elsewhere = [line for line in done.stdout.splitlines() if "Job in scope" in line]
    assert "FINISHED:COMPLETED" in guarded, "the run goes on without the one that refuses"
    # A scope that the policy does not have is no way around it: nothing is deployed there.
    assert "privacy scope 'elsewhere' is not allowed" in elsewhere
    assert "'site-2: OK'" in elsewhere
