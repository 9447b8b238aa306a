"""The client's guard on exchanges as they are recorded, whatever framework carried them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import leakatlas
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import Exchange, Recorder, read_recording
from leakatlas.fl.state import model_state
from leakatlas.integrations.guard import Guard, judged, outgoing
from leakatlas.models import build


def _net() -> nn.Module:
    torch.manual_seed(0)
    return build("lenet5", act="relu", classes=10)


def _normed() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4 * 6 * 6, 3))


def _trapped(state: dict[str, Tensor], layer: str = "hidden.0") -> dict[str, Tensor]:
    """A layer whose rows sort examples into bins."""
    rows, width = state[f"{layer}.weight"].shape
    return {
        **state,
        f"{layer}.weight": torch.full((rows, width), 1.0 / width),
        f"{layer}.bias": -torch.linspace(0.0, 0.5, rows),
    }


def _round(
    folder: Path, make: Callable[[], nn.Module], state: dict[str, Tensor], size: int, *, lr: float
) -> Exchange:
    """What a client that received the state recorded of its round."""
    model = make().train()
    model.load_state_dict(state)
    received = model_state(model)
    x, y = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    F.cross_entropy(model(x), y % 3).backward()
    optimizer.step()
    exchange = Exchange(
        round=1, client="7", place="wire", received=received, sent=model_state(model), examples=4
    )
    Recorder(folder=folder).write(exchange)
    return read_recording(folder).last


def test_an_honest_round_passes_and_a_tampered_one_does_not(tmp_path: Path) -> None:
    honest = _round(tmp_path / "a", _net, _net().state_dict(), 32, lr=0.05)
    tampered = _round(tmp_path / "b", _net, _trapped(_net().state_dict()), 32, lr=0.05)
    for guard in (Guard(model=_net, on_alarm="refuse"), Guard(on_alarm="refuse")):
        assert judged(guard, honest.received, client="7") == ""
        assert "looks tampered with" in judged(guard, tampered.received, client="7")


def test_what_does_not_fit_the_agreed_model_is_an_alarm() -> None:
    state = dict(_net().state_dict()) | {"inserted.weight": torch.zeros(3, 3)}
    said = judged(Guard(model=_net, on_alarm="refuse"), state, client="7")
    assert "cannot be examined" in said
    assert "inserted.weight" in said


def test_a_defended_update_keeps_counters_and_statistics(tmp_path: Path) -> None:
    state = _trapped(dict(_normed().state_dict()), layer="3")
    one = _round(tmp_path, _normed, state, 8, lr=0.5)
    assert one.sent["1.num_batches_tracked"] == 1
    clipping = leakatlas.defense("clipping", max_norm=0.01)
    guard = Guard(model=_normed, on_alarm="defend", defense=clipping)
    changed = guard.defended(one.received, one.sent, round=1, client="7")
    assert set(changed) == set(one.sent)
    assert changed["1.num_batches_tracked"].dtype == torch.int64
    assert changed["1.num_batches_tracked"].shape == ()
    # Statistics of the private batch stay at home, too.
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(changed[name], one.received[name])
        assert not torch.equal(one.sent[name], one.received[name])
    trained = [n for n, _ in _normed().named_parameters()]
    norm = sum(float((changed[n] - one.received[n]).double().square().sum()) for n in trained)
    assert norm**0.5 == pytest.approx(0.01, rel=1e-4)


def _of_units(act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 64), act(), nn.Linear(64, 3))


def test_an_update_that_gives_examples_away_is_seen_before_it_leaves() -> None:
    """Bins of a tampered layer hold single examples; units that never close mix all of them."""
    labels, generator = torch.arange(4) % 3, torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    images *= torch.linspace(0.2, 1.0, 4)[:, None, None, None]

    def leaving(act: type[nn.Module], state: dict[str, Tensor]) -> str:
        model = _of_units(act)
        model.load_state_dict(state)
        F.cross_entropy(model(images), labels).backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        guard = Guard(model=lambda: _of_units(act), examples=lambda: (images, labels))
        return outgoing(guard, state, model_state(model), client="7")

    said = leaving(nn.ReLU, _trapped(model_state(_of_units(nn.ReLU)), layer="1"))
    assert "of 4 own images can be read off it" in said
    assert "one direction" in said
    honest = model_state(_of_units(nn.Sigmoid))
    assert leaving(nn.Sigmoid, honest) == ""
    blind = Guard(model=lambda: _of_units(nn.Sigmoid))
    assert blind.leaving(honest, honest) is None, "nothing to look with"


def test_one_example_behind_an_honest_layer_is_an_alarm() -> None:
    """Nothing is tampered with, and the image stands in the update all the same."""
    x, y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([2])
    makers: list[tuple[Callable[[], nn.Module], int]] = [
        (partial(_of_units, nn.Sigmoid), 1),
        (_net, 0),
    ]
    for make, readable in makers:
        model = make().train()
        received = model_state(model)
        F.cross_entropy(model(x), y).backward()
        torch.optim.SGD(model.parameters(), lr=0.05).step()
        found = Guard(model=make, examples=lambda: (x, y)).leaving(received, model_state(model))
        assert found is not None
        assert (found.readable, found.examples) == (readable, 1)
        assert not found.verdict.alarm
        assert bool(found.alarm) == bool(readable)


def test_the_doctor_knows_whether_an_update_is_what_the_agreed_training_gives(
    tmp_path: Path,
) -> None:
    one = _round(tmp_path, _normed, _normed().state_dict(), 8, lr=0.5)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(4) % 3

    def said(lr: float) -> str:
        protocol = FedAVG(epochs=1, batch_size=4, lr=lr, mode="train")
        guard = Guard(model=_normed, examples=lambda: (x, y), protocol=protocol)
        found = guard.leaving(one.received, one.sent)
        assert found is not None
        assert found.diagnosis is not None
        return found.alarm

    assert said(0.5) == ""
    assert "not what the agreed training gives" in said(0.1)
    with pytest.raises(InvalidParameter, match="all three"):
        Guard(model=_normed, protocol=FedAVG(epochs=1, batch_size=4, lr=0.1))


def test_what_cannot_be_examined_does_not_leave() -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    guard = Guard(model=_net, examples=lambda: (x, y))
    state = model_state(_net())
    sent = {**state, "extra": torch.zeros(1)}
    assert "cannot be examined" in outgoing(guard, state, sent, client="7")


def test_a_guard_is_told_what_it_cannot_do() -> None:
    soteria = leakatlas.defense("soteria")
    with pytest.raises(InvalidParameter, match="both or neither"):
        Guard(model=_net, on_alarm="defend")
    with pytest.raises(InvalidParameter, match="whole updates"):
        Guard(model=_net, on_alarm="defend", defense=soteria)
    with pytest.raises(InvalidInput, match="more than arrays"):
        Guard().arriving({"a": object()})


def test_a_defended_round_is_what_an_audit_then_sees(tmp_path: Path) -> None:
    one = _round(tmp_path / "a", _net, _net().state_dict(), 32, lr=0.05)
    clipping = leakatlas.defense("clipping", max_norm=0.01)
    guard = Guard(model=_net, on_alarm="defend", defense=clipping)
    sent = guard.defended(one.received, one.sent, round=1, client="7")
    Recorder(folder=tmp_path / "b").write(
        Exchange(round=1, client="7", place="wire", received=one.received, sent=sent, examples=4)
    )
    update = read_recording(tmp_path / "b").capture(_net()).update
    norm = sum(float(t.double().square().sum()) for t in update.tensors.values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-4)
