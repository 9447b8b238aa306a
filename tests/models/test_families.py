"""What is special to each family: published shapes, counts and structure."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl.draws import places
from leakatlas.models import CNN6, ConvNet, FCNet, Generator, LeNet, ResNet, ViT, build
from leakatlas.models.structure import linear_layers, parameter_count
from leakatlas.models.vit import Attention


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    "name,settings,count",
    [
        # Sums over the layers named in the papers.
        ("lenet", {}, (75 + 1) * 12 + 2 * (300 + 1) * 12 + (768 + 1) * 10),
        ("allconv", {}, 28 * 24 + 217 * 48 + 433 * 72 + 649 * 96 + 385 * 10),
        ("convnet", {}, 28 * 32 + 289 * 64 + 577 * 64 + 577 * 128 + 8193 * 10),
        # Counts well known from other implementations of the same architectures.
        ("resnet20", {}, 272_474),
        ("resnet18", {}, 11_173_962),
        ("vgg11", {"norm": "batch"}, 9_231_114),
        ("vgg16", {"norm": "batch"}, 14_728_266),
    ],
)
def test_parameter_counts(name: str, settings: dict[str, Any], count: int) -> None:
    assert parameter_count(build(name, **settings)) == count


def test_lenet_is_the_one_of_dlg() -> None:
    model = LeNet()
    assert [c.stride for c in convolutions(model)] == [(2, 2), (2, 2), (1, 1)]
    assert {c.kernel_size for c in convolutions(model)} == {(5, 5)}
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float(values.abs().max()) <= 0.5
    # Uniform on [-1/2, 1/2] has variance 1/12.
    assert float(values.var()) == pytest.approx(1 / 12, rel=0.03)


def test_allconv_halves_the_side_with_every_convolution() -> None:
    model = build("allconv", norm="group")
    assert {c.stride for c in convolutions(model)} == {(2, 2)}
    sides = []
    for convolution in convolutions(model):
        convolution.register_forward_hook(lambda _, __, out: sides.append(out.shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert sides == [16, 8, 4, 2]
    assert parameter_count(model) == parameter_count(build("allconv")) + 2 * (24 + 48 + 72 + 96)


def test_convnet_norms_add_only_their_own_parameters() -> None:
    plain = parameter_count(ConvNet())
    for norm in ("batch", "group", "instance"):
        assert parameter_count(ConvNet(norm=norm)) == plain + 2 * (32 + 64 + 64 + 128)


@pytest.mark.parametrize(("name", "masks"), [("fc", 2), ("vit", 5)])
def test_dropout_draws_in_train_mode_and_adds_no_parameter(name: str, masks: int) -> None:
    plain, dropping = build(name), build(name, dropout=0.25)
    assert parameter_count(plain) == parameter_count(dropping)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.eval()(x), dropping.eval()(x))
    assert [place.keep for place in places(dropping.train(), x)] == pytest.approx([0.75] * masks)
    assert places(plain.train(), x) == ()
    with pytest.raises(InvalidParameter, match=r"dropout=1.*\[0, 1\)"):
        build(name, dropout=1)


def test_convnet_side_must_fit_its_pools() -> None:
    with pytest.raises(InvalidParameter, match="multiple of 4"):
        ConvNet(size=30)


@pytest.mark.parametrize("name,second", [("cnn6", 36), ("cnn6-d", 20)])
def test_cnn6_is_the_one_of_rgap(name: str, second: int) -> None:
    model = build(name)
    assert [c.out_channels for c in convolutions(model)] == [12, second, 36, 36, 64, 128]
    assert [c.stride[0] for c in convolutions(model)] == [2, 2, 1, 1, 2, 1]
    assert all(c.bias is None for c in convolutions(model))
    (head,) = linear_layers(model).values()
    assert (head.in_features, head.out_features) == (3200, 1)
    assert "bias" not in dict(head.named_parameters())
    softmax_form = build(name, classes=10, head_bias=True)
    (head,) = linear_layers(softmax_form).values()
    assert head.bias.shape == (10,)


def test_cnn6_with_identity_is_linear() -> None:
    model = CNN6(act="identity").double()
    a, b = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(model(2 * a - 3 * b), 2 * model(a) - 3 * model(b), atol=1e-12)


def test_fc_widths_and_bias() -> None:
    fcn3 = FCNet(in_channels=1, size=28, classes=1, widths=(1000, 100), bias=False)
    shapes = [tuple(p.shape) for p in fcn3.parameters()]
    assert shapes == [(1000, 784), (100, 1000), (1, 100)]
    assert parameter_count(FCNet(in_channels=1, size=4, classes=3, widths=())) == 17 * 3


def test_resnet_without_norm_has_biases_and_with_norm_none() -> None:
    assert all(c.bias is not None for c in convolutions(ResNet(norm="none")))
    assert all(c.bias is None for c in convolutions(ResNet(norm="group")))


def test_attention_is_scaled_dot_product_attention() -> None:
    attention = Attention(12, 3).double()
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
    assert torch.allclose(attention(x), attention.out(expected), atol=1e-12)


def test_vit_without_positions_cannot_tell_patches_apart() -> None:
    model = ViT(size=8, patch=4, dim=16).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    swapped = torch.cat([x[..., 4:], x[..., :4]], dim=-1)
    assert not torch.allclose(model(x), model(swapped), atol=1e-9)
    with torch.no_grad():
        model.positions.zero_()
    assert torch.allclose(model(x), model(swapped), atol=1e-12)


def test_vit_settings_must_divide() -> None:
    with pytest.raises(InvalidParameter, match="divisible"):
        ViT(dim=30, heads=4)
    with pytest.raises(InvalidParameter, match="multiple of 5"):
        ViT(patch=5)


def test_generator_stages_compose_to_the_whole() -> None:
    model = Generator(classes=3)
    z, y = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    image = model(z, y)
    assert not torch.allclose(image, model(z, y.flip(0)))
    h = model.enter(z, y)
    for stage, module in enumerate(model.stages):
        assert torch.equal(model.resume(h, stage), image)
        h = module(h)
    assert torch.equal(Generator().enter(z), z)
    with pytest.raises(InvalidInput, match="got none"):
        model(z)


def test_generator_images_do_not_depend_on_their_batch_or_mode() -> None:
    model = Generator().double()
    z = torch.randn(3, 128, dtype=torch.float64)
    assert torch.allclose(model(z)[1:2], model(z[1:2]), atol=1e-12)
    assert torch.equal(model.train()(z), model.eval()(z))


def test_generator_has_a_second_derivative() -> None:
    model = Generator(latent=4, size=8, widths=(6, 4), channels=1).double()
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: model(z).square().mean(), (z,))


def test_generator_sizes_and_seeds() -> None:
    assert Generator(size=64, channels=1)(torch.zeros(1, 128)).shape == (1, 1, 64, 64)
    before = torch.get_rng_state()
    a, b = Generator(seed=1), Generator(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    with pytest.raises(InvalidParameter, match="at least one width"):
        Generator(widths=())
    with pytest.raises(InvalidParameter, match="multiple of 8"):
        Generator(size=36)
