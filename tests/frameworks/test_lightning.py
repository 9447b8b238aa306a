"""The Lightning callback against the real library: ``make test-lightning``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leakatlas
from leakatlas.data import patches
from leakatlas.errors import ProtocolError
from leakatlas.fl import FedAVG
from leakatlas.fl.recording import protocol_of, read_recording

pl = pytest.importorskip(
    "pytorch_lightning", reason="make test-lightning builds an environment with Lightning"
)


def _data() -> tuple[Tensor, Tensor]:
    return patches(32, n=8).images.clone(), torch.arange(8) % 10


def _module(optimizers: int = 1, **settings: Any) -> Any:
    class Client(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, 6, 5, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                nn.Linear(6 * 14 * 14, 10),
            )  # fmt: skip
            self.automatic_optimization = optimizers == 1

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # As many do: the module's own forward is never called.
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            made = [
                torch.optim.SGD(self.parameters(), lr=0.05, **settings) for _ in range(optimizers)
            ]
            return made if optimizers > 1 else made[0]

    return Client()


def _fit(module: Any, folder: Path, *, epochs: int = 1, **trainer: Any) -> Any:
    from leakatlas.integrations.lightning import CaptureCallback

    callback = CaptureCallback(folder, client="site-1", round=3)
    loader = DataLoader(TensorDataset(*_data()), batch_size=4)
    pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], **trainer,
    ).fit(module, loader)  # fmt: skip
    return callback


def test_a_fit_is_recorded_and_replayed_with_the_protocol_that_was_seen(tmp_path: Path) -> None:
    callback = _fit(_module(momentum=0.9), tmp_path, epochs=2)
    assert callback.round == 4
    recording = read_recording(tmp_path)
    last = recording.last
    assert (last.round, last.client, last.examples) == (3, "site-1", 8)
    seen = callback.seen.protocol()
    assert (seen.epochs, seen.batch_size, seen.lr, seen.momentum) == (2, 4, 0.05, 0.9)
    given = {"epochs": 2, "shuffle": False}
    protocol = protocol_of(recording.last.settings, kind="weights", given=given)
    net = _module().net
    found = leakatlas.doctor(
        net, _data(), captured=recording.capture(net), protocol=protocol, threat="B"
    ).replay
    assert found.residual is not None
    assert found.residual <= 1e-5
    wrong = FedAVG(epochs=2, batch_size=4, lr=0.05, momentum=0.0)
    culprit = leakatlas.doctor(
        net, _data(), captured=recording.capture(net), protocol=wrong, threat="B"
    ).replay
    assert not culprit.expected
    assert "momentum" in culprit.culprit


def test_training_is_the_same_with_the_callback_as_without(tmp_path: Path) -> None:
    watched, alone = _module(), _module()
    _fit(watched, tmp_path)
    loader = DataLoader(TensorDataset(*_data()), batch_size=4)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(alone, loader)  # fmt: skip
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_what_a_trainer_does_beyond_a_loop_is_said(tmp_path: Path) -> None:
    callback = _fit(_module(), tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2)
    with pytest.raises(ProtocolError, match=r"clipped to 0\.5; gradients of 2 batches"):
        callback.seen.protocol()
    notes = " ".join(read_recording(tmp_path).notes)
    assert "clipped to 0.5" in notes


def test_two_optimizers_are_refused_by_number(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="2 optimizers"):
        _fit(_module(optimizers=2), tmp_path)


def test_a_training_that_fails_leaves_nothing(tmp_path: Path) -> None:
    module = _module()

    def fails(batch: Any, batch_idx: int) -> Tensor:
        raise ValueError("the disk is full")

    module.training_step = fails
    with pytest.raises(ValueError, match="disk"):
        _fit(module, tmp_path)
    assert not list(tmp_path.rglob("*.json"))
