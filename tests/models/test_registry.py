"""What holds for every registered classifier."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas.errors import InvalidParameter, UnknownName
from leakatlas.models import build, names
from tests.models.families import SMALL


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("in_channels,size,classes", [(3, 32, 10), (1, 32, 7), (3, 64, 2)])
def test_shapes(name: str, in_channels: int, size: int, classes: int) -> None:
    model = build(name, in_channels=in_channels, size=size, classes=classes, **SMALL[name])
    assert model(torch.rand(2, in_channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("name", names())
def test_seed_decides_and_global_generator_is_untouched(name: str) -> None:
    before = torch.get_rng_state()
    a, b, c = (build(name, seed=seed, **SMALL[name]).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("name", names())
def test_functional_call_is_the_call(name: str) -> None:
    model = build(name, **SMALL[name]).eval()
    x = torch.rand(2, 3, 32, 32)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(functional_call(model, tensors, (x,)), model(x))
    zeros = {key: torch.zeros_like(value) for key, value in tensors.items()}
    assert not torch.equal(functional_call(model, zeros, (x,)), model(x))


def matching(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The squared norm of the loss gradient: what an attack differentiates again."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    logits = functional_call(model, parameters, (x,))
    # One logit is a binary classifier; softmax over it would have no gradient.
    loss = F.softplus(-logits).mean() if logits.shape[1] == 1 else F.cross_entropy(logits, y)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return torch.stack([g.square().sum() for g in gradients]).sum()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", names())
def test_double_backward_agrees_with_differences(name: str, training: bool) -> None:
    model = build(name, **SMALL[name]).double().train(training)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1])
    (slope,) = torch.autograd.grad(matching(model, x, y), x)
    eps = 1e-7  # small enough that hardly any ReLU or max-pool switches in between
    with torch.no_grad():
        ahead, behind = x + eps * direction, x - eps * direction
    with torch.enable_grad():
        difference = (matching(model, ahead, y) - matching(model, behind, y)) / (2 * eps)
    along = float((slope * direction).sum())
    assert along != 0
    assert along == pytest.approx(float(difference.detach()), rel=1e-4)


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean .*'convnet'"):
        build("conv-net")
    with pytest.raises(InvalidParameter, match="'lenet' has no setting 'norm'"):
        build("lenet", norm="batch")
    with pytest.raises(UnknownName, match="normalisation 'layer'"):
        build("convnet", norm="layer")
    with pytest.raises(UnknownName, match="activation 'relu6'"):
        build("lenet", act="relu6")


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("setting", ["classes", "in_channels", "size"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_every_count_must_be_positive(name: str, setting: str, value: float) -> None:
    with pytest.raises(InvalidParameter, match=setting):
        build(name, **{setting: value})


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("fc", {"classes": 10**9}, "classes is larger than 16,777,216"),
        ("fc", {"widths": [2**20] * 9}, "parameters x 4 bytes"),
        ("convnet", {"size": 2**24}, "parameters x 4 bytes"),
        ("resnet20", {"blocks": [10**6]}, "blocks asks for 1,000,000 layers"),
        ("vit", {"depth": 5000}, "depth asks for 5,000 layers"),
        ("fc", {"widths": [1] * 5000}, "widths asks for 5,000 layers"),
        ("fc", {"widths": None}, "cannot be built"),
        ("fc", {"seed": "x"}, "cannot be built"),
        ("lenet", {"act": ["relu"]}, "cannot be built"),
        ("lenet", {"init_range": float("nan")}, "cannot be built"),
        ("fc", {"name": "x"}, "has no setting 'name'"),
    ],
)
def test_settings_that_no_machine_can_build_are_refused(
    name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidParameter, match=words):
        build(name, **settings)


def test_a_large_model_that_fits_is_built() -> None:
    hidden = build("fc", size=8, widths=[300]).get_submodule("hidden.1")
    assert isinstance(hidden, nn.Linear) and hidden.weight.shape == (300, 192)
