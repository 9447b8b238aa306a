"""Priors of others: small, with random weights, of the real classes where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from leakatlas import priors
from leakatlas.attacks.generative import prior as chosen
from leakatlas.attacks.generative.latent.ggdm import GGDM
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.bench import harness
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.priors import Diffusion, Prior, kept
from leakatlas.priors.foreign.stylegan2 import Synthesis, enlarged, filtered
from tests.conftest import build_stage

ABOUT = {"schema": "leakatlas/prior/1", "data": "nothing", "license": "MIT"}

DCGAN: list[Any] = [
    {"Unflatten": {"dim": 1, "unflattened_size": [6, 1, 1]}},
    {"ConvTranspose2d": {"in_channels": 6, "out_channels": 8, "kernel_size": 4, "bias": False}},
    {"BatchNorm2d": {"num_features": 8}},
    "ReLU",
    {
        "ConvTranspose2d": {
            "in_channels": 8,
            "out_channels": 3,
            "kernel_size": 4,
            "stride": 2,
            "padding": 1,
        }
    },
    "Tanh",
]


def _written(folder: Path, state: dict[str, Tensor], **recipe: object) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(
        {n: t.clone().contiguous() for n, t in state.items()}, folder / "weights.safetensors"
    )
    text = yaml.safe_dump({**ABOUT, "weights": "weights.safetensors", **recipe})
    (folder / "prior.yaml").write_text(text)
    return folder


def _randomised(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(t.shape, generator=draws) if t.is_floating_point() else t
        for n, t in network.state_dict().items()
    }


def _stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (6, 1, 1)), nn.ConvTranspose2d(6, 8, 4, bias=False), nn.BatchNorm2d(8),
        nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1), nn.Tanh(),
    ).eval()  # fmt: skip


def _layers(folder: Path, **more: object) -> Path:
    state = {f"main.{n}": t for n, t in _stack().state_dict().items()}
    recipe = {"kind": "layers", "latent": [6], "layers": DCGAN, "prefix": "main.", "signed": True}
    return _written(folder, state, **{**recipe, **more})


def test_a_stack_of_layers_draws_what_the_module_draws(tmp_path: Path) -> None:
    found = kept.decoder(_layers(tmp_path / "mine", inversion_psnr=17.5))
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    assert found.shape == (3, 8, 8) and found.latent == (6,) and not found.classes
    assert torch.allclose(found.decoder()(z), (_stack()(z) + 1) / 2, atol=1e-6)
    assert found.ceiling == 17.5 and found.card.license == "MIT" and found.card.name == "mine"
    assert not found.knows(torch.rand(1, 3, 8, 8)).any()


def test_an_attack_searches_the_prior_of_a_folder(tmp_path: Path) -> None:
    folder = _layers(tmp_path / "mine")
    attack = GIAS(prior=str(folder), latent_steps=2, generator_steps=2, restarts=1)
    scene = build_stage(model="lenet", examples=1, letter="D")
    assert len(harness.run_trial(scene, attack).images) == 1
    view, _ = harness.observe(scene, attack)
    assert "as good as the prior" in attack.outlook(view).reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"kind": "pickle"}, "kind"),
        ({"weights": "../weights.safetensors"}, "weights"),
        ({"weights": "/etc/passwd"}, "weights"),
        ({"weights": "missing.safetensors"}, "missing.safetensors"),
        ({"license": ""}, "license"),
        ({"latent": [7]}, "does not draw"),
        ({"latent": [10**9]}, "latent"),
        ({"layers": [*DCGAN[:-1], "Flatten"]}, "draws no images"),
        ({"layers": DCGAN[:-3]}, "different networks"),
        ({"layers": [{"Linear": {"in_features": 6, "out_features": 10**15}}]}, "different net"),
        ({"layers": [{"Linear": {"in_features": "six", "out_features": 1}}]}, "cannot be built"),
        ({"layers": [{"Linear": {"wide": 6}}]}, "cannot be built"),
        ({"prefix": ""}, "missing 0.weight|missing 1.weight"),
        ({"inversion_psnr": -1}, "inversion_psnr"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_none_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        priors.load(_layers(tmp_path / "mine", **changes))


@pytest.mark.parametrize("name", ["Sequential", "Module", "__import__", "Transformer", "os.system"])
def test_only_layers_of_the_list_are_built(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnknownName, match="layer of a prior"):
        priors.load(_layers(tmp_path / "mine", layers=[name]))


# -- StyleGAN2 -----------------------------------------------------------------------------------


def _synthesis() -> tuple[Synthesis, dict[str, Tensor]]:
    network = Synthesis([8, 6, 4], 5, 2)
    state = _randomised(network)
    for name in state:
        if name.endswith(".kernel"):
            state[name] = network.state_dict()[name]
    network.load_state_dict(state)
    return network.eval(), state


def test_stylegan2_is_laid_out_by_its_weights(tmp_path: Path) -> None:
    network, state = _synthesis()
    folder = _written(tmp_path / "s", {f"g_ema.{n}": t for n, t in state.items()}, kind="stylegan2")
    found = kept.decoder(folder)
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    assert found.shape == (3, 16, 16) and found.latent == (5,)
    assert torch.allclose(found.decoder()(z), (network(z) + 1) / 2, atol=1e-5)
    with pytest.raises(InvalidInput, match="convert its g_ema"):
        priors.load(_written(tmp_path / "t", {"a": torch.zeros(1)}, kind="stylegan2"))


def test_each_example_is_convolved_with_weights_of_its_own() -> None:
    """The grouped convolution against one example at a time, and both against the definition."""
    network, _ = _synthesis()
    layer: Any = network.convs[1].conv
    draws = torch.Generator().manual_seed(2)
    h, w = torch.randn(2, 6, 8, 8, generator=draws), torch.randn(2, 5, generator=draws)
    out = layer(h, w)
    for i in range(2):
        s = layer.modulation(w)[i]
        scaled = layer.scale * layer.weight[0] * s[None, :, None, None]
        unit = scaled / (scaled.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected = nn.functional.conv2d(h[i : i + 1], unit, padding=1)
        assert torch.allclose(out[i : i + 1], expected, atol=1e-4)
        assert torch.allclose(layer(h[i : i + 1], w[i : i + 1]), expected, atol=1e-4)


def test_an_enlargement_keeps_flat_pictures_flat() -> None:
    network, _ = _synthesis()
    first: Any = network.to_rgbs[0]
    kernel: Tensor = first.upsample.kernel
    flat = enlarged(torch.ones(1, 1, 6, 6), kernel)
    assert flat.shape == (1, 1, 12, 12)
    assert torch.allclose(flat[:, :, 2:-2, 2:-2], torch.ones(1, 1, 8, 8))
    impulse = filtered(torch.ones(1, 1, 1, 1), kernel, (3, 3))
    assert torch.allclose(impulse[0, 0], kernel)


# -- packages ------------------------------------------------------------------------------------


def test_biggan_from_a_local_folder(tmp_path: Path) -> None:
    biggan = pytest.importorskip("pytorch_pretrained_biggan")
    settings = {
        "output_dim": 8, "z_dim": 4, "class_embed_dim": 4, "channel_width": 4, "num_classes": 3,
        "layers": [[True, 16, 8], [False, 8, 4], [False, 4, 2], [False, 2, 1]],
        "attention_layer_position": 9, "eps": 1e-4, "n_stats": 5,
    }  # fmt: skip
    torch.manual_seed(0)
    network = biggan.BigGAN(biggan.BigGANConfig.from_dict(settings)).eval()
    folder = _written(tmp_path / "b", network.state_dict(), kind="biggan", truncation=0.5)
    (folder / "config.json").write_text(json.dumps(settings))
    found = kept.decoder(folder)
    assert found.classes == 3 and found.shape == (3, 8, 8)
    z, y = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 0])
    with torch.no_grad():
        expected = network(0.5 * z, nn.functional.one_hot(y, 3).float(), 0.5)
    assert torch.allclose(found.decoder(y)(z), (expected + 1) / 2, atol=1e-6)
    one = kept.decoder(
        _written(folder, network.state_dict(), kind="biggan", truncation=0.5, label=2)
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
    diffusers = pytest.importorskip("diffusers")
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
    diffusers = pytest.importorskip("diffusers")
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
