"""Priors of others: small, with random weights, of the real classes where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leakatlas import priors
from leakatlas.attacks.generative.latent.gias import GIAS
from leakatlas.attacks.generative.latent.gifd import GIFD
from leakatlas.bench import harness
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.priors import kept
from leakatlas.priors.foreign.stylegan2 import MAPPING_RATE, Synthesis, enlarged, filtered
from tests.conftest import build_stage
from tests.priors.support import check_search, check_stages, written

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
    return written(folder, state, **{**recipe, **more})


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
    """As it is drawn before training, but that its pictures lie within the pixel range."""
    network = Synthesis([8, 6, 4], 5, 2)
    state = _randomised(network)
    for name in state:
        if name.startswith("style."):
            state[name] /= MAPPING_RATE
        if name.startswith("to_rgb") and "modulation" not in name:
            state[name] *= 0.1
        if name.endswith(".kernel"):
            state[name] = network.state_dict()[name]
    network.load_state_dict(state)
    return network.eval(), state


def test_stylegan2_is_laid_out_by_its_weights(tmp_path: Path) -> None:
    network, state = _synthesis()
    folder = written(tmp_path / "s", {f"g_ema.{n}": t for n, t in state.items()}, kind="stylegan2")
    found = kept.decoder(folder)
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    assert found.shape == (3, 16, 16) and found.latent == (5,)
    assert torch.allclose(found.decoder()(z), (network(z) + 1) / 2, atol=1e-5)
    with pytest.raises(InvalidInput, match="convert its g_ema"):
        priors.load(written(tmp_path / "t", {"a": torch.zeros(1)}, kind="stylegan2"))


def _plainly(network: Synthesis, z: Tensor) -> Tensor:
    """The synthesis in one go, one style for all."""
    layers: Any = network
    w, noise = network.style(z), list(network.noises.buffers())
    h = network.conv1(network.input.input.expand(len(z), -1, -1, -1), w, noise[0])
    image: Tensor = network.to_rgb1(h, w, None)
    for level, to_image in enumerate(layers.to_rgbs):
        for k in (2 * level, 2 * level + 1):
            h = layers.convs[k](h, w, noise[k + 1])
        image = to_image(h, w, image)
    return image


def test_the_stages_of_stylegan2_make_the_whole(tmp_path: Path) -> None:
    network, state = _synthesis()
    found = kept.decoder(written(tmp_path / "s", state, kind="stylegan2"))
    z = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(network(z), _plainly(network, z), atol=1e-5)
    check_stages(found, z)
    (styles,) = found.stages[0](z)
    assert styles.shape == (2, 6, 5)  # two a resolution
    h, beside = found.stages[1](styles)
    assert beside is styles and h.shape == (2, 8, 4, 4)
    _, kept_styles, image = found.stages[2](h + 1, styles)
    assert kept_styles is styles and image.shape == (2, 3, 4, 4)


def test_each_style_goes_to_its_own_convolution() -> None:
    """The last one to the last image alone, the one before to the last convolution alone."""
    network, _ = _synthesis()
    _, coarsest, *doublings, finest = network.stages()
    z = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    w = network.style(z)[:, None].repeat(1, 6, 1)

    def features(w: Tensor) -> list[tuple[Tensor, ...]]:
        states = [coarsest(w)]
        for stage in (*doublings, finest):
            states.append(stage(*states[-1]))
        return states

    plain = features(w)
    for number, first in enumerate((0, 1, 1, 2, 2, 3)):
        moved = w.clone()
        moved[:, number] += 1
        now = features(moved)
        # What a state draws: its feature, and the image so far.
        same = [
            torch.equal(a[0], b[0]) and all(map(torch.equal, a[2:], b[2:]))
            for a, b in zip(plain, now, strict=True)
        ]
        assert same.index(False) == first, number


def test_gifd_opens_stylegan2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = _synthesis()
    check_search(kept.decoder(written(tmp_path / "s", state, kind="stylegan2")), monkeypatch)


def test_gifd_opens_a_stack_of_layers(tmp_path: Path) -> None:
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    check_stages(kept.decoder(_layers(tmp_path / "plain", signed=False)), z)
    folder = _layers(tmp_path / "mine")
    found = kept.decoder(folder)
    assert len(found.stages) == 2
    check_stages(found, z)
    scene = build_stage(model="lenet", examples=1, letter="D")
    trial = harness.run_trial(scene, GIFD(prior=str(folder), steps=2, restarts=1))
    assert trial.found.notes.keys() >= {"stage_0_loss", "stage_1_loss"}


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
