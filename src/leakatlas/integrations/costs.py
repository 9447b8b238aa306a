"""What capture and guard cost: a round of local training plain, captured, and guarded.

All in turns within one process, without a framework; ``studies/flower`` measures them under one.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.bench import meter, scene
from leakatlas.bench.cells import Cell
from leakatlas.fl import FedAVG
from leakatlas.fl.state import model_state
from leakatlas.integrations.guard import Guard
from leakatlas.integrations.loops import capture

SECONDS, LEAST = 5.0, 2
"""Processor seconds that a cell's turns take together, and how many there are at least."""

LOOKED_AT = 8
"""Images that the guard may look at."""

MB = 1e6


def measure(cell: Cell) -> dict[str, float]:
    """Ratios are medians over turns, so that a busy machine slows both sides of each."""
    federation = scene.staged(cell).federation
    protocol, client = federation.protocol, federation.clients[0]
    assert isinstance(protocol, FedAVG)
    agreed, x, y = federation.model, client.x, client.y
    weights = Guard(on_alarm="refuse")
    whole = Guard(
        model=lambda: copy.deepcopy(agreed), on_alarm="refuse",
        examples=lambda: (x[:LOOKED_AT], y[:LOOKED_AT]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], object]] = {
            "captured over plain": lambda: _captured(agreed, x, y, protocol, Path(folder)),
            "guarded over plain, weights": lambda: _guarded(agreed, x, y, protocol, weights),
            "guarded over plain, all checks": lambda: _guarded(agreed, x, y, protocol, whole),
        }
        for call in ways.values():  # imports and first allocations are no round's
            call()
        plain: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        begun = time.process_time()
        while len(plain) < LEAST or time.process_time() - begun < SECONDS:
            alone = meter.least(lambda: _train(agreed, x, y, protocol), 1, time.process_time)
            plain.append(alone)
            for name, call in ways.items():
                ratios[name].append(meter.least(call, 1, time.process_time) / alone)
        files = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    sent = sum(t.nbytes for t in model_state(agreed).values())
    return {
        "plain round, CPU ms": 1e3 * statistics.median(plain),
        **{name: statistics.median(values) for name, values in ratios.items()},
        "model, MB": sent / MB,
        "captured, MB": files / MB,
        "captured over sent, bytes": files / sent,
    }


def _train(agreed: nn.Module, x: Tensor, y: Tensor, protocol: FedAVG) -> nn.Module:
    model, optimizer = _client(agreed, protocol)
    return _steps(model, optimizer, x, y, protocol)


def _client(agreed: nn.Module, protocol: FedAVG) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = copy.deepcopy(agreed).train()
    return model, torch.optim.SGD(model.parameters(), lr=protocol.lr)


def _steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, protocol: FedAVG
) -> nn.Module:
    for _ in range(protocol.epochs):
        for part in torch.arange(len(x)).split(protocol.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model


def _captured(agreed: nn.Module, x: Tensor, y: Tensor, protocol: FedAVG, folder: Path) -> None:
    model, optimizer = _client(agreed, protocol)
    with capture(model, optimizer, examples=len(x)) as seen:
        _steps(model, optimizer, x, y, protocol)
    seen.save(folder)


def _guarded(agreed: nn.Module, x: Tensor, y: Tensor, protocol: FedAVG, guard: Guard) -> None:
    received = model_state(agreed)
    guard.arriving(received)
    guard.leaving(received, model_state(_train(agreed, x, y, protocol)))
