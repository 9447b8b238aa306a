"""Exchanges on disk: whole or absent, within the limit, read back as what an audit takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import leakatlas
from leakatlas.data import photos
from leakatlas.errors import InvalidInput, LeakAtlasError, UnknownName
from leakatlas.fl.protocol import FedAVG, FedSGD
from leakatlas.fl.recording import Exchange, Recorder, protocol_of, read_recording
from leakatlas.fl.state import model_state
from leakatlas.models import build

LR = 0.1


def _net(*, norm: str = "none") -> nn.Module:
    torch.manual_seed(1)
    return build("convnet", classes=10, **({"norm": norm} if norm != "none" else {}))


def _batch() -> tuple[Tensor, Tensor]:
    return photos(32).images[:2].clone(), torch.tensor([3, 5])


def _exchange(number: int = 1, client: str = "7", net: nn.Module | None = None) -> Exchange:
    """One step of SGD by a real client."""
    net = _net().train() if net is None else net.train()
    before = model_state(net)
    x, y = _batch()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    return Exchange(
        round=number, client=client, place="wire", received=before, sent=model_state(net),
        examples=2, settings={"learning-rate": LR, "local-epochs": 1, "batch-size": 2},
        framework="a framework 1.0",
    )  # fmt: skip


def test_what_is_written_is_audited_like_a_round(tmp_path: Path) -> None:
    Recorder(folder=tmp_path).write(_exchange())
    recording = read_recording(tmp_path)
    protocol = protocol_of(recording.last.settings, kind=recording.last.kind)
    assert protocol == FedAVG(epochs=1, batch_size=2, lr=LR)
    found = leakatlas.doctor(
        _net(), _batch(), captured=recording.capture(_net()), protocol=protocol, threat="B"
    )
    assert found.replay.residual is not None
    assert found.replay.residual < 1e-5

    wrong = replace(protocol, momentum=0.9, epochs=2)
    found = leakatlas.doctor(
        _net(), _batch(), captured=recording.capture(_net()), protocol=wrong, threat="B"
    )
    assert not found.replay.expected


def test_a_gradient_and_a_change_are_read_as_what_they_are(tmp_path: Path) -> None:
    whole = _exchange()
    names = dict(_net().named_parameters())
    moved = {n: whole.sent[n] - whole.received[n] for n in names}
    Recorder(folder=tmp_path / "delta").write(replace(whole, kind="delta", sent=moved))
    slopes = {n: -t / LR for n, t in moved.items()}
    Recorder(folder=tmp_path / "gradient").write(replace(whole, kind="gradient", sent=slopes))
    for kind, protocol in (
        ("delta", FedAVG(epochs=1, batch_size=2, lr=LR)),
        ("gradient", FedSGD(mode="train")),
    ):
        recording = read_recording(tmp_path / kind)
        capture = recording.capture(_net())
        assert capture.update.kind == kind
        found = leakatlas.doctor(_net(), _batch(), captured=capture, protocol=protocol, threat="B")
        assert found.replay.residual is not None
        assert found.replay.residual < 1e-4, kind


def test_several_rounds_come_in_order_and_can_be_chosen(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path)
    for number in (10, 2, 1):
        recorder.write(_exchange(number))
    recording = read_recording(tmp_path)
    assert [e.round for e in recording.exchanges] == [1, 2, 10]
    assert recording.select([2]).last.round == 2
    with pytest.raises(InvalidInput, match="these were: 1, 2, 10"):
        recording.select([3])


def test_clients_and_places_are_named(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path)
    recorder.write(_exchange(client="site/1"))
    recorder.write(_exchange(client="site-2"))
    recorder.write(replace(_exchange(client="site-2"), place="raw"))
    assert read_recording(tmp_path, client="site-2").last.client == "site-2"
    assert any("2" in note and "site/1" in note for note in read_recording(tmp_path).notes)
    assert read_recording(tmp_path, place="raw").last.place == "raw"
    with pytest.raises(UnknownName, match="site-3"):
        read_recording(tmp_path, client="site-3")
    with pytest.raises(UnknownName, match="server"):
        read_recording(tmp_path, place="server")


def test_only_chosen_rounds_and_clients_are_wanted(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path, rounds=frozenset({1, 3}), clients=frozenset({"7"}))
    assert recorder.wants(1, "7")
    assert not recorder.wants(2, "7")
    assert not recorder.wants(1, "8")


def test_what_passes_the_limit_is_left_out_and_said(tmp_path: Path) -> None:
    exchange = _exchange()
    size = sum(t.nbytes for t in [*exchange.received.values(), *exchange.sent.values()])
    recorder = Recorder(folder=tmp_path, limit=int(1.5 * size))
    assert not recorder.refuses(size)
    recorder.write(exchange)
    why = recorder.refuses(size)
    assert "limit" in why
    recorder.write(replace(exchange, round=2), left_out=why)
    recording = read_recording(tmp_path)
    assert [e.round for e in recording.exchanges] == [1]
    assert any("round 2 was left out" in note for note in recording.notes)


def test_a_killed_writer_leaves_no_half_exchange(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path)
    recorder.write(_exchange(1))
    # Killed between its arrays and its facts, and in the middle of its arrays.
    recorder.write(_exchange(2))
    (tmp_path / "round-00002" / "wire-7.json").unlink()
    (tmp_path / "round-00003").mkdir()
    (tmp_path / "round-00003" / ".wire-7.safetensors.1.part").write_bytes(b"half")
    assert [e.round for e in read_recording(tmp_path).exchanges] == [1]


def test_counters_and_single_numbers_survive(tmp_path: Path) -> None:
    net = _net(norm="batch")
    exchange = _exchange(net=net)
    assert any(t.ndim == 0 and not t.is_floating_point() for t in exchange.sent.values())
    Recorder(folder=tmp_path).write(exchange)
    capture = read_recording(tmp_path).capture(net)
    assert any("num_batches" in name for name in capture.update.buffers_after)


def test_several_versions_in_one_folder_are_read_and_said(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path)
    recorder.write(replace(_exchange(1), framework="a framework 0.9"))
    recorder.write(_exchange(2))
    recording = read_recording(tmp_path)
    assert [e.framework for e in recording.exchanges] == ["a framework 0.9", "a framework 1.0"]
    assert "several versions: a framework 0.9, a framework 1.0" in " ".join(recording.notes)


def test_a_place_where_nothing_can_be_seen_is_said_and_another_is_read(tmp_path: Path) -> None:
    recorder = Recorder(folder=tmp_path)
    recorder.write(replace(_exchange(), received={}, sent={}), left_out="SecAgg+ masks it")
    recorder.write(replace(_exchange(), place="raw"))
    recorder.write(replace(_exchange(client="all"), place="aggregate", cohort=2))
    recording = read_recording(tmp_path)
    assert recording.last.place == "aggregate"
    assert "nothing is to be seen at wire: SecAgg+ masks it" in recording.notes
    with pytest.raises(InvalidInput, match="SecAgg"):
        read_recording(tmp_path, place="wire")


def test_arrays_that_came_without_names_are_places_in_a_list(tmp_path: Path) -> None:
    named = _exchange(net=_net(norm="batch"))
    order = list(_net(norm="batch").state_dict())
    received = {str(i): named.received[n] for i, n in enumerate(order)}
    sent = {str(i): named.sent[n] for i, n in enumerate(order)}
    Recorder(folder=tmp_path).write(replace(named, received=received, sent=sent))
    found = read_recording(tmp_path).capture(_net(norm="batch")).update.tensors
    for name, tensor in found.items():
        assert torch.equal(tensor, named.sent[name] - named.received[name]), name


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    sent = {"a": whole, "b": whole, "part": whole[2:4], "turned": torch.ones(2, 3).T}
    Recorder(folder=tmp_path).write(replace(_exchange(), received=sent, sent=sent))
    read = read_recording(tmp_path).last.sent
    assert all(torch.equal(read[name], tensor) for name, tensor in sent.items())


def test_unknown_counts_and_settings_are_asked_for_by_name(tmp_path: Path) -> None:
    Recorder(folder=tmp_path).write(replace(_exchange(), examples=None, settings={"lr": 0.1}))
    recording = read_recording(tmp_path)
    with pytest.raises(InvalidInput, match="examples="):
        recording.capture(_net())
    assert recording.capture(_net(), examples=2).num_examples == 2
    with pytest.raises(InvalidInput, match=r"epochs, batch_size.*recorded settings: lr"):
        protocol_of(recording.last.settings, kind="weights")
    known = protocol_of(
        recording.last.settings, kind="weights", given={"epochs": 2, "batch_size": 1}
    )
    assert known == FedAVG(epochs=2, batch_size=1, lr=0.1)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: (p / "round-00001" / "wire-7.json").write_text("{", encoding="utf-8"),
        lambda p: (p / "round-00001" / "wire-7.json").write_text("[]", encoding="utf-8"),
        lambda p: (p / "round-00001" / "wire-7.safetensors").write_bytes(b"half"),
        lambda p: (p / "round-00001" / "wire-7.safetensors").unlink(),
    ],
    ids=["json", "no-facts", "truncated", "no-arrays"],
)
def test_damaged_files_are_named(tmp_path: Path, spoil: object) -> None:
    Recorder(folder=tmp_path).write(_exchange())
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(LeakAtlasError, match="wire-7"):
        read_recording(tmp_path)


def test_facts_of_another_form_are_refused(tmp_path: Path) -> None:
    Recorder(folder=tmp_path).write(_exchange())
    path = tmp_path / "round-00001" / "wire-7.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts | {"surprise": 1}), encoding="utf-8")
    with pytest.raises(InvalidInput, match="surprise"):
        read_recording(tmp_path)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no exchange"):
        read_recording(tmp_path)
