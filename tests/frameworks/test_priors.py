"""Priors of others, small and with random weights, by the real packages: ``make test-priors``."""

from __future__ import annotations

import json
from pathlib import Path

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
from tests.priors.support import ABOUT, written

REASON = "make test-priors builds an environment with it"
biggan = pytest.importorskip("pytorch_pretrained_biggan", reason=REASON)
diffusers = pytest.importorskip("diffusers", reason=REASON)


def test_biggan_from_a_local_folder(tmp_path: Path) -> None:
    settings = {
        "output_dim": 8, "z_dim": 4, "class_embed_dim": 4, "channel_width": 4, "num_classes": 3,
        "layers": [[True, 16, 8], [False, 8, 4], [False, 4, 2], [False, 2, 1]],
        "attention_layer_position": 9, "eps": 1e-4, "n_stats": 5,
    }  # fmt: skip
    torch.manual_seed(0)
    network = biggan.BigGAN(biggan.BigGANConfig.from_dict(settings)).eval()
    folder = written(tmp_path / "b", network.state_dict(), kind="biggan", truncation=0.5)
    (folder / "config.json").write_text(json.dumps(settings))
    found = kept.decoder(folder)
    assert found.classes == 3 and found.shape == (3, 8, 8)
    z, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    with torch.no_grad():
        expected = network(0.5 * z, nn.functional.one_hot(y, 3).float(), 0.5)
    assert torch.allclose(found.decoder(y)(z), (expected + 1) / 2, atol=1e-6)
    one = kept.decoder(
        written(folder, network.state_dict(), kind="biggan", truncation=0.5, label=2)
    )
    assert one.classes == 0
    assert torch.allclose(one.decoder()(z[:1]), (expected[:1] + 1) / 2, atol=1e-6)
    (folder / "config.json").write_text(json.dumps({**settings, "channel_width": 2**15}))
    with pytest.raises(InvalidInput, match="different networks"):
        kept.decoder(folder)


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


def test_the_decoder_of_an_autoencoder_from_a_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=2,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path, safe_serialization=True)
    recipe = {**ABOUT, "kind": "autoencoder_kl", "size": 16}
    recipe["weights"] = "diffusion_pytorch_model.safetensors"
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(recipe))
    found = kept.decoder(tmp_path)
    assert isinstance(found, Prior) and found.latent == (2, 8, 8) and found.shape == (3, 16, 16)
    z = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network.decode(z / network.config.scaling_factor).sample
    assert torch.allclose(found.decoder()(z), (expected + 1) / 2, atol=1e-5)
    assert chosen.named(str(tmp_path), (3, 16, 16)) == (str(tmp_path),)
