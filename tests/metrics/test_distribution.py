"""Fréchet distance: torchmetrics' arithmetic against SciPy, and Inception unavailable by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, Unavailable
from leakatlas.metrics import distribution
from leakatlas.metrics.distribution import fid, frechet_distance


def features(n: int, width: int = 6, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return scale * torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing


def by_scipy(a: Tensor, b: Tensor) -> float:
    """The closed form with SciPy's matrix square root."""
    x, y = a.numpy(), b.numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(a, b, measure="injected features").value


@pytest.mark.parametrize(("n", "m"), [(40, 40), (25, 90)])
def test_injected_features_agree_with_scipy(n: int, m: int) -> None:
    a, b = features(n), features(m, seed=1, scale=2.0) + 3.0
    assert distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


def test_known_values() -> None:
    a = features(50)
    shift = torch.tensor([3.0, 4.0, 0, 0, 0, 0], dtype=torch.float64)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a + shift, a) == pytest.approx(25, rel=1e-9)  # equal covariance: the means
    # a and c a: (1 - c)^2 (|mean|^2 + trace of the covariance)
    expected = float(a.mean(0).square().sum() + np.trace(np.cov(a.numpy(), rowvar=False)))
    assert distance(3 * a, a) == pytest.approx(4 * expected, rel=1e-9)


def test_the_result_says_whose_features_and_how_many() -> None:
    found = frechet_distance(features(5), features(7), measure="mine")
    assert (found.images_hat, found.images, found.features) == (5, 7, 6)
    assert found.measure == "mine"  # never "FID" on other features


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (features(1), features(5), "at least two rows"),
        (features(5), features(5, 7), "at least two rows each"),
        (torch.full((4, 6), torch.nan), features(5), "not finite"),
    ],
)
def test_bad_features_are_refused(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        distance(a, b)


def images(n: int = 3, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def installed(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Answer the question whether torch-fidelity is installed; others as they are."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return there or None if name == "torch_fidelity" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_missing_package_and_missing_weights_name_their_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    installed(monkeypatch, False)
    with pytest.raises(Unavailable, match=r"pip install 'leakatlas\[perceptual\]'"):
        fid(images(), images())
    installed(monkeypatch, True)
    with pytest.raises(Unavailable, match=r"6726825d.*python -c .*F\('inception-v3-compat'"):
        fid(images(), images())
    assert not (tmp_path / "hub").exists()  # nothing was fetched behind the user's back


class Sums(nn.Module):
    """Stands where Inception does, and records what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.fed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.fed.append(x)
        return x.double().mean(dim=(2, 3))


def test_inception_is_fed_three_channels_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Sums()
    monkeypatch.setattr(distribution, "_inception", lambda: network)
    x = images(5, channels=1)
    found = fid(x * 2 - 0.5, x, batch=2)  # out of range: clamped
    assert [tuple(f.shape) for f in network.fed] == [(2, 3, 8, 8)] * 2 + [(1, 3, 8, 8)] + [
        (2, 3, 8, 8)
    ] * 2 + [(1, 3, 8, 8)]
    assert all(f.dtype == torch.uint8 for f in network.fed)
    assert found.measure == "FID" and found.value > 0


@pytest.mark.parametrize("x", [images(1), images(3, 2), images(3)[0]])
def test_bad_images_are_refused_before_anything_loads(x: Tensor) -> None:
    with pytest.raises(InvalidInput, match="at least two images"):
        fid(x, images())
    with pytest.raises(InvalidInput, match="not finite"):
        fid(images() / 0, images())
