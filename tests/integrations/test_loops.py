"""A plain training loop, captured from outside, is what the adversary would see of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import leakatlas
from leakatlas.data import photos
from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import read_recording
from leakatlas.models import build

LABELS = torch.tensor([1, 4, 7, 2])


def _client() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    return build("convnet", classes=10).train(), photos(32).images[:4].clone(), LABELS


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    for _ in range(2):
        for part in (slice(0, 2), slice(2, 4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.8, 0.99))


@pytest.mark.parametrize("make", [_sgd, _adam])
def test_what_a_loop_did_is_described_well_enough_to_be_replayed(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model, x, y = _client()
    optimizer = make(model)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        _train(model, optimizer, x, y)

    protocol = seen.protocol()
    assert (protocol.epochs, protocol.batch_size, protocol.mode) == (2, 2, "train")
    # The order is unknown to the adversary, not to the check: these batches came in order.
    ordered = FedAVG.from_json({**vars(protocol), "shuffle": False})
    fresh, _, _ = _client()
    found = leakatlas.doctor(fresh, (x, y), captured=seen.capture(), protocol=ordered)
    assert found.replay.consistent, found.replay  # Adam rounds: 1e-2 in single precision
    if protocol.optimizer == "sgd":
        assert found.replay.residual is not None
        assert found.replay.residual < 1e-5


def test_the_model_is_left_as_the_loop_left_it() -> None:
    model, x, y = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        _train(model, optimizer, x, y)
    alone, _, _ = _client()
    _train(alone, torch.optim.SGD(alone.parameters(), lr=0.05), x, y)
    assert all(
        torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True)
    )
    assert not model._forward_pre_hooks
    assert seen.steps == 4


def test_an_evaluation_inside_is_not_a_training_pass() -> None:
    model, x, y = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        _train(model, optimizer, x, y)
        model.eval()
        with torch.no_grad():
            model(x.repeat(5, 1, 1, 1))
    assert seen.protocol().batch_size == 2
    assert seen.protocol().mode == "train"


def test_what_no_protocol_describes_is_refused_by_name() -> None:
    model, x, y = _client()
    for optimizer, word in (
        (torch.optim.AdamW(model.parameters(), lr=1e-3), "AdamW"),
        (torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True), "nesterov"),
    ):
        with leakatlas.capture(model, optimizer, examples=4) as seen:
            _train(model, optimizer, x, y)
        with pytest.raises(ProtocolError, match=word):
            seen.protocol()
        assert seen.update().kind == "delta"  # the capture itself stands


def test_a_schedule_is_seen() -> None:
    model, x, y = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        for _ in range(2):
            _train(model, optimizer, x, y)
            schedule.step()
    with pytest.raises(ProtocolError, match="between steps"):
        seen.protocol()


def test_steps_that_are_no_epochs_and_a_missing_count_are_told() -> None:
    model, x, y = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with leakatlas.capture(model, optimizer) as seen:
        _train(model, optimizer, x, y)
    with pytest.raises(InvalidInput, match=r"examples=len\(data\)"):
        seen.update()
    seen.examples = 6
    with pytest.raises(ProtocolError, match="whole number of epochs"):
        seen.protocol()


def test_a_block_without_training_holds_nothing() -> None:
    model, _, _ = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        with pytest.raises(ProtocolError, match="block ends"):
            seen.update()
    with pytest.raises(ProtocolError, match="no step"):
        seen.update()


def test_a_saved_exchange_reads_back(tmp_path: Path) -> None:
    model, x, y = _client()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with leakatlas.capture(model, optimizer, examples=4) as seen:
        _train(model, optimizer, x, y)
    seen.save(tmp_path, round=2, client="site-1")
    back = read_recording(tmp_path)
    assert back.last.client == "site-1"
    again = back.capture(model).update
    assert all(torch.equal(t, again.tensors[n]) for n, t in seen.update().tensors.items())
