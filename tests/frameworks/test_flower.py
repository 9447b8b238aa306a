"""The Flower adapter against the real library: messages first, then the engine.

Flower cannot share this project's environment (it wants an older typer and rich):
``make test-flower`` builds one for it and runs this file there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import leakatlas
from leakatlas.audit.promises import promise_of
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import Place, protocol_of, read_recording

pytest.importorskip("flwr", reason="make test-flower builds an environment with Flower")

APP = Path(__file__).parents[2] / "examples" / "flower"
NODES = 2
PLACES: tuple[Place, ...] = ("raw", "wire", "server")


@pytest.fixture(autouse=True)
def app_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(APP))
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return  # older releases make messages anywhere
    # Newer ones make them in a running task only.
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def _context(folder: Path, **config: Any) -> Any:
    from flwr.app import Context, RecordDict

    described = tomllib.loads((APP / "pyproject.toml").read_text(encoding="utf-8"))
    settings = described["tool"]["flwr"]["app"]["config"] | {
        "secret": "token", "leakatlas-folder": str(folder),
    }  # fmt: skip
    return Context(
        run_id=1, node_id=77, node_config={"partition-id": 0}, state=RecordDict(),
        run_config=settings | config,
    )  # fmt: skip


def _message(state: dict[str, torch.Tensor], number: int = 1) -> Any:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

    content = RecordDict(
        {"arrays": ArrayRecord(state), "config": ConfigRecord({"server-round": number})}
    )
    return Message(content=content, dst_node_id=77, message_type=MessageType.TRAIN)


def _task() -> Any:
    return importlib.import_module("quickstart.task")


def _client() -> Any:
    return importlib.import_module("quickstart.client_app")


def test_a_round_is_recorded_and_replayed_with_the_right_protocol_alone(tmp_path: Path) -> None:
    task, client = _task(), _client()
    reply = client.app(_message(task.net().state_dict()), _context(tmp_path))
    assert not reply.has_error()
    assert set(reply.content) == {"arrays", "metrics"}, "nothing is added to messages"

    recording = read_recording(tmp_path, place="wire")
    assert recording.last.settings["partition-id"] == 0
    assert "secret" not in recording.last.settings
    protocol = protocol_of(recording.last.settings, kind=recording.last.kind)
    assert protocol == FedAVG(epochs=1, batch_size=4, lr=0.05)
    batch, capture = task.load_data(0), recording.capture(task.net())
    right = leakatlas.doctor(
        task.net(), batch, captured=capture, protocol=protocol, threat="B"
    ).replay
    assert right.residual is not None
    assert right.residual <= 1e-5
    wrong = leakatlas.doctor(
        task.net(), batch, captured=capture, protocol=FedAVG(batch_size=4, lr=0.05, momentum=0.9),
        threat="B",
    ).replay  # fmt: skip
    assert not wrong.expected
    assert "plain SGD" in wrong.explanation


def test_the_two_places_differ_by_the_noise_between_them(tmp_path: Path) -> None:
    task, client = _task(), _client()
    client.app(_message(task.net().state_dict()), _context(tmp_path, defense="local_dp"))
    raw = read_recording(tmp_path, place="raw").last
    wire = read_recording(tmp_path, place="wire").last
    moved = {n: raw.sent[n] - raw.received[n] for n in raw.sent}
    norm = math.sqrt(sum(float(t.double().square().sum()) for t in moved.values()))
    # The mod clips the change to 1 first, then adds noise to every number.
    clipped = {n: raw.received[n] + t * min(1.0, 1.0 / norm) for n, t in moved.items()}
    noise = torch.cat([(wire.sent[n] - clipped[n]).double().flatten() for n in wire.sent])
    promised = 0.01 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 5.0
    assert float(noise.std()) == pytest.approx(promised, rel=5 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 5 * promised / math.sqrt(len(noise))
    # What such noise promises, it does not give; whoever reads the capture is told.
    promise = promise_of(wire.settings)
    assert promise is not None
    assert promise.sigma == pytest.approx(promised)
    assert len(promise.doubts(rounds=3)) == 4


def test_the_two_places_differ_by_a_clipping_mod_between_them(tmp_path: Path) -> None:
    """Flower's own, whose norm the server sends along."""
    task, client = _task(), _client()
    message = _message(task.net().state_dict())
    message.content["config"]["clipping_norm"] = 0.01
    assert not client.app(message, _context(tmp_path, defense="clipping")).has_error()
    raw, wire = (read_recording(tmp_path, place=place).last for place in ("raw", "wire"))
    moved = {p.place: {n: (p.sent[n] - t).double() for n, t in p.received.items()}
             for p in (raw, wire)}  # fmt: skip
    norms = {p: sum(float(t.square().sum()) for t in m.values()) ** 0.5 for p, m in moved.items()}
    assert norms["raw"] > 0.02
    assert norms["wire"] == pytest.approx(0.01, rel=1e-4)
    for name, tensor in moved["raw"].items():
        clipped = tensor * 0.01 / norms["raw"]
        torch.testing.assert_close(moved["wire"][name], clipped, atol=1e-7, rtol=1e-3)


def test_a_guard_refuses_a_tampered_model_and_answers_with_an_error(tmp_path: Path) -> None:
    from leakatlas.integrations.flower import REFUSED

    task, client = _task(), _client()
    clean = client.app(_message(task.net().state_dict()), _context(tmp_path, guard="refuse"))
    assert not clean.has_error()
    state = task.trap(task.net().state_dict())
    reply = client.app(_message(state), _context(tmp_path, guard="refuse"))
    assert reply.has_error()
    assert reply.error.code == REFUSED
    assert "refuses this round" in reply.error.reason
    logged = client.app(_message(state), _context(tmp_path, guard="log"))
    assert not logged.has_error()


def _alone() -> torch.nn.Module:
    """An honest network whose first layer is fed pixels: one image stands in its update."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(3 * 8 * 8, 16), torch.nn.Sigmoid(), torch.nn.Linear(16, 3))
    return torch.nn.Sequential(torch.nn.Flatten(), *layers)


@pytest.mark.parametrize("on_alarm", ["log", "refuse", "defend"])
def test_a_guard_reads_what_would_leave_as_a_server_would(
    tmp_path: Path, on_alarm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import Guard, capture_wire_mod, guard_mod

    image, label = torch.rand(1, 3, 8, 8), torch.tensor([1])
    defense = leakatlas.defense("clipping", max_norm=0.01) if on_alarm == "defend" else None
    guard = Guard(
        model=_alone, on_alarm=on_alarm, defense=defense, examples=lambda: (image, label),
        protocol=FedAVG(epochs=1, batch_size=1, lr=0.5, mode="train"),
    )  # fmt: skip
    app = ClientApp(mods=[capture_wire_mod, guard_mod(guard)])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        model = _alone().train()
        torch.nn.functional.cross_entropy(model(image), label).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict())}), reply_to=message)

    start = _alone().state_dict()
    reply = app(_message(start), _context(tmp_path))
    said = "1 of 1 own images can be read off it"
    if on_alarm == "refuse":
        assert said in reply.error.reason
        assert not list(tmp_path.glob("*/*.safetensors")), "nothing left"
        return
    assert said in caplog.text
    sent = reply.content["arrays"].to_torch_state_dict()
    moved = sum(float((sent[n] - t).double().square().sum()) for n, t in start.items()) ** 0.5
    assert (moved == pytest.approx(0.01, rel=1e-3)) == (on_alarm == "defend")


def test_a_guard_defends_what_leaves(tmp_path: Path) -> None:
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import Guard, guard_mod

    task, client = _task(), _client()
    defense = leakatlas.defense("clipping", max_norm=0.01)
    guard = Guard(model=task.net, on_alarm="defend", defense=defense)
    app = ClientApp(mods=[guard_mod(guard)])
    app.train()(client.fit)
    state = task.trap(task.net().state_dict())
    reply = app(_message(state), _context(tmp_path))
    sent = reply.content["arrays"].to_torch_state_dict()
    moved = sum(float((sent[n] - t).double().square().sum()) for n, t in state.items()) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)
    honest = app(_message(task.net().state_dict()), _context(tmp_path))
    free = honest.content["arrays"].to_torch_state_dict()
    start = task.net().state_dict()
    assert sum(float((free[n] - t).square().sum()) for n, t in start.items()) ** 0.5 > 0.02


def test_a_failing_client_is_not_recorded_and_stays_an_error(tmp_path: Path) -> None:
    from flwr.app import Error, Message
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import capture_wire_mod

    app = ClientApp(mods=[capture_wire_mod])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        return Message(Error(code=3, reason="no data"), reply_to=message)

    reply = app(_message(_task().net().state_dict()), _context(tmp_path))
    assert reply.error.code == 3
    assert not list(tmp_path.glob("round-*"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"leakatlas-folder": "captures"}, "absolute path"),
        ({"leakatlas-rounds": "one"}, "whole numbers"),
        ({"leakatlas-limit-mb": -1.0}, "positive number"),
        ({"leakatlas-foldr": "/x"}, "known: leakatlas-clients"),
    ],
)
def test_settings_that_make_no_sense_are_told(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    from leakatlas.integrations.flower import recorder_of

    with pytest.raises(InvalidParameter, match=words):
        recorder_of({"leakatlas-folder": str(tmp_path)} | config)


def test_only_chosen_rounds_and_clients_are_recorded_and_a_small_limit_is_kept(
    tmp_path: Path,
) -> None:
    task, client = _task(), _client()
    state = task.net().state_dict()
    for number in (1, 2):
        chosen = _context(tmp_path / "rounds", **{"leakatlas-rounds": "2"})
        client.app(_message(state, number), chosen)
    assert [p.name for p in (tmp_path / "rounds").iterdir()] == ["round-00002"]
    client.app(_message(state), _context(tmp_path / "others", **{"leakatlas-clients": "76,78"}))
    assert not (tmp_path / "others").exists()
    client.app(_message(state), _context(tmp_path / "mine", **{"leakatlas-clients": "76, 77"}))
    assert {p.name for p in (tmp_path / "mine").glob("*/*.json")} == {"raw-77.json", "wire-77.json"}
    client.app(_message(state), _context(tmp_path / "small", **{"leakatlas-limit-mb": 0.1}))
    facts = (tmp_path / "small" / "round-00001" / "wire-77.json").read_text(encoding="utf-8")
    assert "limit" in facts
    assert not list((tmp_path / "small").glob("*/*.safetensors"))


def test_an_evaluation_is_neither_recorded_nor_guarded(tmp_path: Path) -> None:
    """No update leaves with it."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import Guard, capture_raw_mod, capture_wire_mod, guard_mod

    guard = guard_mod(Guard(on_alarm="refuse"))
    app = ClientApp(mods=[capture_wire_mod, guard, capture_raw_mod])

    @app.evaluate()
    def judge(message: Any, context: Any) -> Any:
        metrics = MetricRecord({"loss": 1.0, "num-examples": 4})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    tampered = ArrayRecord(_task().trap(_task().net().state_dict()))
    message = Message(RecordDict({"arrays": tampered}), dst_node_id=77, message_type="evaluate")
    assert not app(message, _context(tmp_path)).has_error()
    assert not list(tmp_path.glob("round-*"))


def test_a_server_cannot_hide_a_second_model_from_the_guard(tmp_path: Path) -> None:
    from flwr.app import ArrayRecord

    task, client = _task(), _client()
    message = _message(task.net().state_dict())
    message.content["other"] = ArrayRecord(task.trap(task.net().state_dict()))
    reply = client.app(message, _context(tmp_path, guard="refuse"))
    assert reply.has_error()
    assert "2 records of arrays" in reply.error.reason


def test_counters_and_single_numbers_pass_unharmed(tmp_path: Path) -> None:
    """Batch normalisation's counter is a 0-d integer; it is recorded, and never noised."""
    from flwr.app import ArrayRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import Guard, capture_wire_mod, guard_mod

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        body = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        return torch.nn.Sequential(*body, torch.nn.Linear(4 * 6 * 6, 3))

    defense = leakatlas.defense("clipping", max_norm=0.01)
    guard = Guard(model=make, on_alarm="defend", defense=defense)
    app = ClientApp(mods=[capture_wire_mod, guard_mod(guard)])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        model = make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.nn.functional.cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.arange(4) % 3)
        model(torch.rand(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        content = RecordDict({"arrays": ArrayRecord(model.state_dict())})
        return Message(content=content, reply_to=message)

    rows = torch.full((3, 144), 1.0 / 144)
    tampered = make().state_dict() | {"3.weight": rows, "3.bias": -torch.linspace(0.0, 0.5, 3)}
    reply = app(_message(tampered), _context(tmp_path))
    sent = reply.content["arrays"].to_torch_state_dict()
    assert sent["1.num_batches_tracked"].dtype == torch.int64
    recorded = read_recording(tmp_path, place="wire").last
    assert recorded.sent["1.num_batches_tracked"].shape == ()
    assert {n: t.dtype for n, t in recorded.sent.items()} == {n: t.dtype for n, t in sent.items()}
    capture = read_recording(tmp_path, place="wire").capture(make(), examples=4)
    assert "1.num_batches_tracked" not in capture.update.tensors


def _noise_carries_counters(folder: Path) -> bool:
    """Flower's own mod alone: in 1.24 it fails on arrays of a single number."""
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import LocalDpMod

    app = ClientApp(mods=[LocalDpMod(1.0, 0.01, 5.0, 1e-5)])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        from flwr.app import ArrayRecord, Message, RecordDict

        moved = ArrayRecord({"weight": torch.ones(2), "counter": torch.tensor(4)})
        return Message(RecordDict({"arrays": moved}), reply_to=message)

    try:
        app(_message({"weight": torch.zeros(2), "counter": torch.tensor(3)}), _context(folder))
    except TypeError:
        return False
    return True


def test_the_recording_that_the_gate_reads_is_what_the_library_makes(tmp_path: Path) -> None:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import LocalDpMod

    from leakatlas.integrations.flower import capture_raw_mod, capture_wire_mod
    from tests.integrations.recorded import FLOWER, SETTINGS, make, train

    if not _noise_carries_counters(tmp_path):
        assert _engine().too_old(), "a Flower of today lost what it could"
        pytest.skip("an old Flower's LocalDpMod fails on the counters of batch normalisation")

    noise = LocalDpMod(clipping_norm=1.0, sensitivity=0.01, epsilon=5.0, delta=1e-5)
    app = ClientApp(mods=[capture_wire_mod, noise, capture_raw_mod])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        model = make()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        train(model)
        arrays = ArrayRecord(model.state_dict())
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 4})}
        return Message(content=RecordDict(content), reply_to=message)

    folder = FLOWER if os.environ.get("LEAKATLAS_RECORD") else tmp_path
    context = _context(folder)
    context.run_config = {**SETTINGS, "leakatlas-folder": str(folder)}
    assert not app(_message(make().state_dict()), context).has_error()
    for place in ("raw", "wire"):
        now = read_recording(folder, place=place).last
        kept = read_recording(FLOWER, place=place).last
        assert now.settings == kept.settings
        assert now.received.keys() == kept.received.keys()
    # The noise is drawn anew; what training gave is the same up to rounding.
    for name, tensor in read_recording(folder, place="raw").last.sent.items():
        torch.testing.assert_close(tensor, read_recording(FLOWER, place="raw").last.sent[name])


def test_a_server_records_whom_it_heard_and_passes_on_the_rest(tmp_path: Path) -> None:
    """Lost replies, errors, and one that nobody asked for: none of them stops a round."""
    from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from leakatlas.integrations.flower import CapturingStrategy

    state = _task().net().state_dict()

    class Fixed(FedAvg):  # type: ignore[misc, unused-ignore]
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            content = {"arrays": arrays, "config": ConfigRecord({"server-round": server_round})}
            for node in (11, 12, 13):
                yield Message(RecordDict(content), dst_node_id=node, message_type="train")

    strategy = CapturingStrategy(Fixed(), tmp_path)
    sent = list(strategy.configure_train(1, ArrayRecord(state), ConfigRecord({}), None))
    assert len(sent) == 3, "what a strategy yields is passed on whole"
    heard = Message(
        RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 4})}),
        reply_to=sent[0],
    )
    failed = Message(Error(code=3, reason="killed"), reply_to=sent[1])
    arrays, _ = strategy.aggregate_train(1, iter([heard, failed]))  # the third never answers
    assert arrays is not None
    names = sorted(path.name for path in tmp_path.glob("*/*.json"))
    assert names == ["aggregate-all.json", "server-11.json"]
    assert read_recording(tmp_path, place="aggregate").last.cohort == 1


def test_a_model_larger_than_the_limit_costs_no_memory_and_is_told(tmp_path: Path) -> None:
    """What does not fit the folder is never copied; the size is read off the message."""
    import resource

    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp

    from leakatlas.integrations.flower import capture_raw_mod, capture_wire_mod

    app = ClientApp(mods=[capture_wire_mod, capture_raw_mod])

    @app.train()
    def fit(message: Any, context: Any) -> Any:
        content = RecordDict({"arrays": message.content["arrays"]})
        return Message(content=content, reply_to=message)

    megabytes = 200
    big = {"weight": torch.zeros(megabytes * 2**18)}
    message, context = _message(big), _context(tmp_path, **{"leakatlas-limit-mb": 1.0})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not app(message, context).has_error()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < megabytes / 2, f"{grown:.0f} MiB more for two places that record nothing"
    facts = sorted(tmp_path.glob("*/*.json"))
    assert len(facts) == 2
    assert all("pass the limit" in path.read_text(encoding="utf-8") for path in facts)
    assert not list(tmp_path.glob("*/*.safetensors"))


# -- the engine ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A local superlink of these tests' own, ended with them."""
    if why := _engine().too_old():
        pytest.skip(why)
    with _engine().engine(tmp_path_factory.mktemp("flwr")) as environment:
        yield environment


def _engine() -> Any:
    spec = importlib.util.spec_from_file_location("engine", APP / "engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(
    engine: dict[str, str], folder: Path, *, app: Path = APP, rounds: int = 3, **config: Any
) -> str:
    said: str = _engine().run(
        engine, app=app, leakatlas_folder=folder, num_server_rounds=rounds, **config
    )
    print(said)  # pytest shows it where a test fails
    return said


def test_three_rounds_of_two_clients_under_the_real_engine(
    engine: dict[str, str], tmp_path: Path
) -> None:
    _run(engine, tmp_path)
    task = _task()
    for place in ("wire", "raw", "server"):
        recording = read_recording(tmp_path, place=place)
        assert [e.round for e in recording.exchanges] == [1, 2, 3], place
    wire = read_recording(tmp_path, place="wire")
    server = read_recording(tmp_path, place="server", client=wire.last.client)
    assert all(torch.equal(t, server.last.sent[n]) for n, t in wire.last.sent.items())
    part = int(wire.last.settings["partition-id"])
    found = leakatlas.doctor(
        task.net(), task.load_data(part), captured=wire.capture(task.net()),
        protocol=protocol_of(wire.last.settings, kind="weights"), threat="B",
    )  # fmt: skip
    assert found.replay.residual is not None
    assert found.replay.residual <= 1e-5
    first = next(
        c for c in _heard(tmp_path, 1)
        if read_recording(tmp_path, place="raw", client=c).last.settings["partition-id"] == 0
    )  # fmt: skip
    _asked_in_one_line(engine, tmp_path, "--truth", "patches:32:8", "--client", first)
    # A server's messages do not say how clients train; the command would ask for it by name.
    said = ("--protocol=lr=0.05", "--protocol=epochs=1", "--protocol=batch_size=4")
    shared = ("--truth", "patches:32:16", "--place", "aggregate", *said)
    _asked_in_one_line(engine, tmp_path, *shared)
    # What everybody sees is the mean of what the server saw.
    mean = read_recording(tmp_path, place="aggregate").last
    clients = {
        e.name.split("-", 1)[1].removesuffix(".json") for e in tmp_path.glob("*/server-*.json")
    }
    assert len(clients) == NODES
    sent = [read_recording(tmp_path, place="server", client=c).last.sent for c in sorted(clients)]
    for name, tensor in mean.sent.items():
        torch.testing.assert_close(tensor, sum(s[name] for s in sent) / NODES)


def _asked_in_one_line(engine: dict[str, str], folder: Path, *options: str) -> None:
    """The doctor, with the network of the app itself and the images behind the capture."""
    done = subprocess.run(
        [
            sys.executable, "-m", "leakatlas", "doctor", "--captured", str(folder), "--json",
            "--model", str(APP / "quickstart" / "task.py") + ":net", *options,
        ],
        text=True, capture_output=True, check=False, env=engine,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert found["replay"]["consistent"], found
    assert found["replay"]["residual"] <= 5e-5, "a mean of two rounds once more"


def _heard(folder: Path, round: int) -> set[str]:
    """Whose replies the server recorded in a round."""
    return {p.stem.split("-", 1)[1] for p in folder.glob(f"round-{round:05d}/server-*.safetensors")}


def test_a_run_goes_on_when_its_clients_refuse_a_round(
    engine: dict[str, str], tmp_path: Path
) -> None:
    said = _run(engine, tmp_path, tamper="all", guard="refuse", rounds=1)
    assert not list(tmp_path.glob("*/server-*.safetensors")), "no refused client was heard"
    assert "Strategy execution finished" in said


def test_a_run_goes_on_without_the_client_that_refuses(
    engine: dict[str, str], tmp_path: Path
) -> None:
    said = _run(engine, tmp_path, tamper="one", guard="refuse", rounds=2)
    assert "Strategy execution finished" in said
    heard = [_heard(tmp_path, number) for number in (1, 2)]
    assert [len(names) for names in heard] == [1, 1]
    assert heard[0] == heard[1], "the one that was sent the agreed model"
    honest = read_recording(tmp_path, place="server", client=heard[0].pop()).last
    mean = read_recording(tmp_path, place="aggregate").last
    assert mean.cohort == 1
    assert all(torch.equal(mean.sent[n], t) for n, t in honest.sent.items())


def test_a_tampered_round_is_trained_with_a_named_defense_instead(
    engine: dict[str, str], tmp_path: Path
) -> None:
    _run(engine, tmp_path, tamper="all", guard="defend", rounds=1)
    for client in _heard(tmp_path, 1):
        norms = {}
        for place in ("raw", "wire"):
            one = read_recording(tmp_path, place=place, client=client).last
            moved = sum((one.sent[n] - t).double().square().sum() for n, t in one.received.items())
            norms[place] = float(moved) ** 0.5
        assert norms["wire"] == pytest.approx(0.01, rel=1e-3)
        assert norms["raw"] > 0.015
    assert len(_heard(tmp_path, 1)) == NODES


def test_a_run_goes_on_without_a_client_that_fails(engine: dict[str, str], tmp_path: Path) -> None:
    _run(engine, tmp_path, fail="raise")
    heard = [_heard(tmp_path, number) for number in (1, 2, 3)]
    assert [len(names) for names in heard] == [2, 1, 2]


def test_a_killed_client_leaves_what_was_recorded_whole(
    engine: dict[str, str], tmp_path: Path
) -> None:
    """Flower's simulation loses the process of both clients; its run and our captures end well."""
    said = _run(engine, tmp_path, fail="kill", rounds=2)
    assert "Strategy execution finished" in said
    assert [len(_heard(tmp_path, number)) for number in (1, 2)] == [2, 0]
    assert not list(tmp_path.rglob("*.part")), "no half exchange is left"
    assert [e.round for e in read_recording(tmp_path, place="server").exchanges] == [1]


def test_under_secure_aggregation_there_is_the_mean_alone(
    engine: dict[str, str], tmp_path: Path
) -> None:
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    described = (app / "pyproject.toml").read_text(encoding="utf-8")
    described = described.replace("quickstart.server_app:app", "quickstart.secagg:server_app")
    described = described.replace("quickstart.client_app:app", "quickstart.secagg:client_app")
    (app / "pyproject.toml").write_text(described, encoding="utf-8")
    folder = tmp_path / "captures"
    _run(engine, folder, app=app, rounds=1)
    assert not list(folder.glob("*/wire-*.safetensors"))
    for facts in folder.glob("*/wire-*.json"):
        assert "SecAgg+ masks it" in facts.read_text(encoding="utf-8")
    recording = read_recording(folder)  # nobody says where: the first place with something to see
    assert (recording.last.place, recording.last.cohort) == ("aggregate", NODES)
    assert any("SecAgg+ masks it" in note for note in recording.notes)
    task = _task()
    images, labels = zip(*(task.load_data(part) for part in range(NODES)), strict=True)
    protocol = FedAVG(epochs=1, batch_size=4, lr=0.05)
    found = leakatlas.doctor(
        task.net(), (torch.cat(images), torch.cat(labels)), protocol=protocol, clients=NODES,
        captured=recording.capture(task.net()), threat="B",
    ).replay  # fmt: skip
    # What separates them is SecAgg+'s own rounding: 2^22 steps between -8 and 8.
    assert found.residual is not None
    assert found.residual <= 0.05
    clients = {p.stem.split("-", 1)[1] for p in folder.glob("*/raw-*.safetensors")}
    raw = [read_recording(folder, place="raw", client=c).last.sent for c in sorted(clients)]
    for name, tensor in recording.last.sent.items():
        mean = sum(sent[name] for sent in raw) / NODES
        torch.testing.assert_close(tensor.float(), mean, atol=16 / 2**22, rtol=0)


def test_a_clipping_strategy_and_its_mod_are_seen_at_every_place(
    engine: dict[str, str], tmp_path: Path
) -> None:
    """Flower's central differential privacy: clients clip, the server adds noise to the mean."""
    settings: dict[str, Any] = {"dp-clipping-norm": 0.01, "dp-noise-multiplier": 0.5}
    _run(engine, tmp_path, rounds=1, defense="clipping", **settings)
    clients = sorted(_heard(tmp_path, 1))
    assert len(clients) == NODES
    sent = []
    for client in clients:
        places = {p: read_recording(tmp_path, place=p, client=client).last for p in PLACES}
        norms = {
            p: sum(float((e.sent[n] - t).double().square().sum()) for n, t in e.received.items())
            for p, e in places.items()
        }
        assert norms["raw"] ** 0.5 > 0.02
        assert norms["wire"] ** 0.5 == pytest.approx(0.01, rel=1e-3)
        server = places["server"].sent
        assert all(torch.equal(t, server[n]) for n, t in places["wire"].sent.items())
        sent.append(server)
    mean = read_recording(tmp_path, place="aggregate").last.sent
    noise = torch.cat(
        [(t - sum(s[n] for s in sent) / NODES).double().flatten() for n, t in mean.items()]
    )
    promised = 0.5 * 0.01 / NODES
    assert float(noise.std()) == pytest.approx(promised, rel=5 / math.sqrt(2 * len(noise)))


@pytest.mark.parametrize("options", [(), ("--local-dp",)])
def test_the_example_runs_and_audits_itself(
    engine: dict[str, str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Capture and audit; once with Flower's own local differential privacy in between."""
    done = subprocess.run(
        [
            sys.executable, "audit.py", str(tmp_path), "--rounds", "1", "--budget", "10s", *options,
        ],
        cwd=APP, text=True, capture_output=True, check=False, env=engine,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert float(said["Residual of the replay before any mod"]) <= 1e-5
    assert "plain SGD" in said["With a wrong optimizer the doctor says"]
    assert {"wire", "server", "aggregate"} <= set(said)
    if options:
        measured = float(said["Noise measured between the two places"])
        promised = 0.01 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 5.0
        assert measured == pytest.approx(promised, rel=0.02)
        assert "NOT given" in done.stdout
