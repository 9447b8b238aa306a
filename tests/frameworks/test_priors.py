"""Priors of others, small and with random weights, by the real packages: ``make test-priors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from leakatlas.attacks.generative import prior as chosen
from leakatlas.attacks.generative.latent.ggdm import GGDM
from leakatlas.bench import harness
from leakatlas.errors import InvalidInput
from leakatlas.priors import Diffusion, Prior, kept
from tests.conftest import build_stage
from tests.priors.support import ABOUT, check_search, check_stages, written

REASON = "make test-priors builds an environment with it"
biggan = pytest.importorskip("pytorch_pretrained_biggan", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)


BIGGAN = {
    "output_dim": 16, "z_dim": 4, "class_embed_dim": 4, "channel_width": 4, "num_classes": 3,
    "layers": [[True, 16, 8], [False, 8, 4], [True, 4, 2], [False, 2, 1]],
    "attention_layer_position": 2, "eps": 1e-4, "n_stats": 5,
}  # fmt: skip


def _biggan(folder: Path, **recipe: object) -> tuple[Any, Path]:
    torch.manual_seed(0)
    network = biggan.BigGAN(biggan.BigGANConfig.from_dict(BIGGAN))
    last, (attention,) = (
        network.generator.bn,
        [layer for layer in network.generator.layers if hasattr(layer, "gamma")],
    )
    with torch.no_grad():
        last.weight.fill_(2.0)  # the package leaves them as the memory was
        last.bias.zero_()
        attention.gamma.fill_(0.5)  # it starts without effect
        for _ in range(20):  # so many steps find the spectral norms
            network(torch.randn(3, 4), torch.eye(3), 0.5)
    network.eval()
    written(folder, network.state_dict(), kind="biggan", truncation=0.5, **recipe)
    (folder / "config.json").write_text(json.dumps(BIGGAN))
    return network, folder


def test_biggan_from_a_local_folder(tmp_path: Path) -> None:
    network, folder = _biggan(tmp_path / "b")
    found = kept.decoder(folder)
    assert found.classes == 3 and found.shape == (3, 16, 16)
    z, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    with torch.no_grad():
        expected = network(0.5 * z, nn.functional.one_hot(y, 3).float(), 0.5)
    assert torch.allclose(found.decoder(y)(z), (expected + 1) / 2, atol=1e-6)
    one = kept.decoder(_biggan(folder, label=2)[1])
    assert one.classes == 0
    assert torch.allclose(one.decoder()(z[:1]), (expected[:1] + 1) / 2, atol=1e-6)
    (folder / "config.json").write_text(json.dumps({**BIGGAN, "channel_width": 2**15}))
    with pytest.raises(InvalidInput, match="different networks"):
        kept.decoder(folder)


def test_gifd_opens_biggan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kept.decoder(_biggan(tmp_path / "b")[1])
    z, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    check_stages(found, z, y)
    assert len(found.stages) == 6  # attention goes with the block behind it
    h, about = found.stages[0](z, y)
    assert h.shape == (2, 64, 4, 4) and torch.equal(about[:, :4], 0.5 * z)
    assert found.stages[3](found.stages[2](*found.stages[1](h, about))[0], about)[1] is about
    one = kept.decoder(_biggan(tmp_path / "one", label=2)[1])
    check_stages(one, z)
    check_search(found, monkeypatch, y=2)


UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 8],
    "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"], "add_attention": False,
}  # fmt: skip


def test_a_diffusion_pipeline_from_a_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**UNET)
    network.save_pretrained(tmp_path / "unet", safe_serialization=True)
    diffusers.DDPMScheduler(num_train_timesteps=50).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump({**ABOUT, "kind": "unet2d"}))
    found = kept.diffusion(tmp_path)
    assert isinstance(found, Diffusion) and found.shape == (3, 8, 8) and len(found.kept) == 50
    assert float(found.kept[0]) == pytest.approx(1 - 1e-4)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(found.noise(x, 7), network.eval()(x, 7).sample, atol=1e-6)
    attack = GGDM(prior=str(tmp_path), steps=2, samples=1)
    scene = build_stage(model="lenet", examples=1, letter="D")
    assert len(harness.run_trial(scene, attack).images) == 1
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "UNet3D"}))
    with pytest.raises(InvalidInput, match="expected UNet2DModel"):
        kept.diffusion(tmp_path)


def _autoencoder(folder: Path) -> Any:
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=2,
    ).eval()  # fmt: skip
    network.save_pretrained(folder, safe_serialization=True)
    recipe = {**ABOUT, "kind": "autoencoder_kl", "size": 16}
    recipe["weights"] = "diffusion_pytorch_model.safetensors"
    (folder / "prior.yaml").write_text(yaml.safe_dump(recipe))
    return network


def test_the_decoder_of_an_autoencoder_from_a_local_folder(tmp_path: Path) -> None:
    network = _autoencoder(tmp_path)
    found = kept.decoder(tmp_path)
    assert isinstance(found, Prior) and found.latent == (2, 8, 8) and found.shape == (3, 16, 16)
    z = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.decode(z / network.config.scaling_factor).sample
    assert torch.allclose(found.decoder()(z), (expected + 1) / 2, atol=1e-5)
    assert chosen.named(str(tmp_path), (3, 16, 16)) == (str(tmp_path),)


def test_gifd_opens_an_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _autoencoder(tmp_path)
    found = kept.decoder(tmp_path)
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    check_stages(found, z)
    assert [h.shape[1:] for h in _features(found, z)] == [(8, 8, 8), (8, 16, 16), (8, 16, 16)]
    check_search(found, monkeypatch, falls=0.6)  # group normalisation undoes part of a move


def _features(prior: Prior, z: torch.Tensor) -> list[torch.Tensor]:
    features: list[torch.Tensor] = []
    state: tuple[torch.Tensor, ...] = (z,)
    with torch.no_grad():
        for stage in prior.stages[:-1]:
            state = stage(*state)
            features.append(state[0])
    return features
