"""Captures and arrays by a model's names: what fits, what does not, and what a file brings back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG, Update, model_state
from leakatlas.fl.capture import Capture, CapturedRound
from leakatlas.fl.naming import by_name
from tests.conftest import build_stage, relative_error


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    return net


def test_each_order_is_told_from_the_others() -> None:
    net = _net()
    state = [t.numpy() for t in net.state_dict().values()]
    parameters = [p.detach() for p in net.parameters()]
    trained = [p.detach() for p in net.parameters() if p.requires_grad]
    assert by_name(state, net, "x").order == "in the order of state_dict()"
    floats = [t for t in state if t.dtype.kind == "f"]
    assert "without counters" in by_name(floats, net, "x").order
    assert by_name(parameters, net, "x").order == "in the order of parameters()"
    found = by_name(trained, net, "x")
    assert "take gradients" in found.order and "0.weight" not in found.parameters


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped_and_named(prefix: str) -> None:
    net = _net()
    found = by_name({f"{prefix}{n}": t for n, t in net.state_dict().items()}, net, "x")
    assert set(found.parameters) == {n for n, _ in net.named_parameters()}
    assert prefix in found.order


def test_what_does_not_fit_is_told_with_both_sides() -> None:
    net = _net()
    with pytest.raises(InvalidInput, match=r"lacks 'fc'; the model has '0\.weight'"):
        by_name({"fc": torch.zeros(1)}, net, "update")
    with pytest.raises(InvalidInput, match="has shape"):
        by_name({"0.weight": torch.zeros(1)}, net, "update")
    with pytest.raises(InvalidInput, match="expected an array"):
        by_name({"0.bias": "three"}, net, "update")
    with pytest.raises(InvalidInput, match="is a int"):
        by_name(3, net, "update")  # type: ignore[arg-type]  # what people do
    with pytest.raises(InvalidInput, match="a buffer; buffers have none"):
        Update.from_gradients(list(net.state_dict().values()), net, num_examples=1)


def test_a_delta_holds_what_is_trained_and_its_state_is_that_of_the_client() -> None:
    net = _net()
    after = [t + 1 for t in net.state_dict().values()]
    update = Update.from_arrays(list(net.state_dict().values()), after, net, num_examples=3)
    assert list(update.tensors) == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert all(torch.allclose(t, torch.ones(())) for t in update.tensors.values())
    with pytest.raises(InvalidInput, match=r"before lacks '1\.bias'"):
        Update.from_state_dicts(
            {"1.weight": np.ones(3)}, {"1.weight": np.ones(3), "1.bias": np.ones(3)}, net,
            num_examples=3,
        )  # fmt: skip


def test_sign_and_scale_of_weights_are_undone_before_they_become_a_change() -> None:
    net = _net()
    received = model_state(net)
    sent = {n: -2 * (p.detach() + 0.5) for n, p in net.named_parameters()}
    update = Update(tensors=sent, kind="weights", state_hash="", num_examples=1, sign=-1, scale=2.0)
    delta = update.as_delta(received)
    assert (delta.kind, delta.sign, delta.scale) == ("delta", 1, 1.0)
    assert all(torch.allclose(t, torch.tensor(0.5)) for t in delta.tensors.values())


def test_a_capture_comes_back_from_its_file(tmp_path: Path) -> None:
    net = _net()
    after = [t + 1 for t in net.state_dict().values()]
    update = Update.from_arrays(list(net.state_dict().values()), after, net, num_examples=3)
    rounds = tuple(
        CapturedRound(update=update, received=model_state(net), index=i, client=7, cohort=4)
        for i in (3, 5)
    )
    capture = Capture(rounds=rounds, notes=("by hand",))
    capture.save(tmp_path / "c.safetensors")
    again = Capture.load(tmp_path / "c.safetensors")
    assert again.fingerprint() == capture.fingerprint() and again.notes == ("by hand",)
    assert [(r.index, r.client, r.cohort) for r in again.rounds] == [(3, 7, 4), (5, 7, 4)]
    update.save(tmp_path / "u.safetensors")
    assert len(Capture.load(tmp_path / "u.safetensors").rounds) == 1
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidInput, match="leakatlas capture FILE"):
        Capture.load(tmp_path / "x.safetensors")
    with pytest.raises(InvalidInput, match="at least one round"):
        Capture(rounds=())
    odd = CapturedRound(update=update, received={"nobody": torch.zeros(1)})
    with pytest.raises(InvalidInput, match="'nobody' of shape"):
        Capture(rounds=(odd,)).fitted(net)


def test_a_view_of_a_capture_is_that_of_the_round_it_recorded() -> None:
    stage = build_stage(protocol=FedAVG(epochs=2, batch_size=2, lr=0.1), examples=3)
    record = stage.federation.play_round()
    simulated = stage.view([record])
    capture = Capture(rounds=(CapturedRound(update=record.updates[0], received=record.states[0]),))
    stage.play_back(capture)
    captured = stage.view([stage.federation.play_round()])
    assert captured.fingerprint() == simulated.fingerprint()
    x, y = stage.federation.clients[0].x, stage.federation.clients[0].y
    assert relative_error(captured.replay(x, y), captured.update.tensors) < 1e-10


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_a_captured_state_that_is_not_finite_is_refused(name: str, tmp_path: Path) -> None:
    net = _net()
    update = Update.from_state_dicts(net.state_dict(), net.state_dict(), net, num_examples=2)
    received = model_state(net)
    received[name].view(-1)[0] = torch.nan
    Capture(rounds=(CapturedRound(update=update, received=received),)).save(tmp_path / "c")
    with pytest.raises(InvalidInput, match=f"received in round 0 of the capture .*'{name}'"):
        Capture.load(tmp_path / "c").fitted(net)
