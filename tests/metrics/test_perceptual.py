"""Perceptual measures: unavailable by name, real when the weights are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable
from leakatlas.metrics import perceptual


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    return tmp_path / "hub" / "checkpoints"


def photos(side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_missing_weights_name_the_file_and_the_command(net: perceptual.Net, hub: Path) -> None:
    assert not perceptual.available(net)
    with pytest.raises(Unavailable, match=r"python -c \"import torchvision; torchvision\.models"):
        perceptual.lpips(photos(), photos(), net=net)
    assert not hub.exists()  # nothing was fetched behind the user's back


def test_dists_needs_vgg(hub: Path) -> None:
    with pytest.raises(Unavailable, match="vgg16"):
        perceptual.dists(photos(), photos())
    assert not hub.exists()


def test_lpips_runs_on_weights_that_lie_on_disk(hub: Path) -> None:
    hub.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save(state, perceptual.weights_file("squeeze"))
    x = photos()
    same = perceptual.lpips(x, x, net="squeeze")
    assert same.values.abs().max() < 1e-6 and same.net == "squeeze"
    other = perceptual.lpips(x.flip(3), x, net="squeeze").values
    assert other.shape == (2,) and (other > 1e-4).all()
    one = perceptual.lpips(x[:1].flip(3), x[:1], net="squeeze").values
    torch.testing.assert_close(one, other[:1], rtol=1e-4, atol=1e-6)  # per image, not pooled
    grey = x.mean(dim=1, keepdim=True)
    assert perceptual.lpips(grey, grey, net="squeeze").values.abs().max() < 1e-6
    with pytest.raises(InvalidInput, match="1 or 3 channels"):
        perceptual.lpips(photos(channels=4), photos(channels=4), net="squeeze")
    with pytest.raises(InvalidInput, match="at least 32 pixels"):
        perceptual.lpips(photos(8), photos(8), net="squeeze")


def test_unknown_net_is_named() -> None:
    with pytest.raises(InvalidParameter, match="net='resnet'"):
        perceptual.weights_file("resnet")  # type: ignore[arg-type]  # the wrong value is the test
