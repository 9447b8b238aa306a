"""What Opacus releases is captured after clip and noise, and its accountant goes on counting."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

import leakatlas
from leakatlas.errors import InvalidInput, ProtocolError
from leakatlas.fl import FedSGD
from leakatlas.fl.state import model_state
from leakatlas.integrations.opacus import capture_release, formal
from leakatlas.models import build

NORM = 0.5


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus: secure mode off, hooks of its own
        yield


def _private(noise: float, *, wrapped: bool = True) -> tuple[Any, Any, Any, Tensor, Tensor]:
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    model = build("lenet", size=16, classes=8)
    x, y = torch.rand(4, 3, 16, 16), torch.arange(4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    engine = PrivacyEngine()
    private, optimizer, _ = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data,
        noise_multiplier=noise, max_grad_norm=NORM, poisson_sampling=False,
        **({} if wrapped else {"wrap_model": False}),
    )  # fmt: skip
    return engine, private if wrapped else model, optimizer, x, y


def _step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _clipped(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The mean of the clipped gradients of single examples, in a loop."""
    torch.manual_seed(0)
    model = build("lenet", size=16, classes=8)
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        slopes = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in slopes.values()]).norm()
        for name, slope in slopes.items():
            sums[name] += slope * min(1.0, float(NORM / (norm + 1e-6))) / len(x)
    return sums


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_released_gradient_is_the_clipped_mean_plus_noise(wrapped: bool) -> None:
    """Also where Opacus leaves the model as it is and hooks into it (from 1.6 on)."""
    if not wrapped and Version(version("opacus")) < Version("1.6"):
        pytest.skip("an Opacus before 1.6 always wraps the model")
    _, model, optimizer, x, y = _private(noise=2.0, wrapped=wrapped)
    with capture_release(optimizer) as release:
        _step(model, optimizer, x, y)
    update = release.capture(model, examples=4).update
    expected = _clipped(x, y)
    noise = torch.cat([(update.tensors[n] - t).flatten() for n, t in expected.items()])
    # N(0, (noise_multiplier * norm / examples)^2)
    promised = 2.0 * NORM / 4
    assert float(noise.std()) == pytest.approx(promised, rel=5 / (2 * len(noise)) ** 0.5)


def test_without_noise_it_is_consistent_with_the_gradient_of_one_example() -> None:
    _, model, optimizer, x, y = _private(noise=0.0)
    before = {n.removeprefix("_module."): t for n, t in model_state(model).items()}
    with capture_release(optimizer) as release:
        _step(model, optimizer, x, y)
    capture = release.capture(model, examples=4, received=before)
    for name, tensor in _clipped(x, y).items():
        torch.testing.assert_close(capture.update.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert "noise multiplier 0" in capture.notes[0]
    torch.manual_seed(0)
    found = leakatlas.doctor(
        build("lenet", size=16, classes=8), (x, y), captured=capture, protocol=FedSGD(), threat="B"
    )
    assert not found.replay.consistent, "the mean of clipped gradients is no plain gradient"


def test_the_accountant_goes_on_counting_and_is_left_in_place() -> None:
    engine, model, optimizer, x, y = _private(noise=2.0)
    before = optimizer.step_hook
    with capture_release(optimizer) as release:
        _step(model, optimizer, x, y)
        _step(model, optimizer, x, y)
    assert len(release.gradients) == 2
    assert optimizer.step_hook is before
    found = formal(engine, delta=1e-5)
    twice = float(found["epsilon"])
    assert sum(steps for *_, steps in engine.accountant.history) == 2
    _step(model, optimizer, x, y)
    assert float(formal(engine, delta=1e-5)["epsilon"]) > twice
    capture = release.capture(model, examples=4, spent=found)
    assert f"counted epsilon {twice:.3g} at delta 1e-05" in capture.notes[1]


def test_nothing_released_and_another_model_are_told() -> None:
    _, model, optimizer, x, y = _private(noise=1.0)
    with capture_release(optimizer) as release:
        pass
    with pytest.raises(ProtocolError, match="no step"):
        release.capture(model, examples=4)
    with capture_release(optimizer) as release:
        _step(model, optimizer, x, y)
    with pytest.raises(InvalidInput, match="not those"):
        release.capture(nn.Linear(2, 2), examples=4)
