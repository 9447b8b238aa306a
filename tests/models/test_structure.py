import pytest
from torch import nn

from leakatlas.models import build
from leakatlas.models.structure import (
    batchnorm_layers,
    first_linear,
    has_batchnorm,
    last_linear,
    linear_layers,
    parameter_count,
)


@pytest.mark.parametrize(
    "name,expected",
    [("convnet", False), ("convnet-bn", True), ("resnet8", True), ("vit", False), ("fc", False)],
)
def test_has_batchnorm(name: str, expected: bool) -> None:
    assert has_batchnorm(build(name)) is expected


def test_batchnorm_of_any_dimension_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.GroupNorm(1, 3))
    assert list(batchnorm_layers(model)) == ["1"]
    assert not has_batchnorm(build("convnet", norm="group"))


def test_first_and_last_linear_have_names_and_identity() -> None:
    model = build("fc", widths=(5, 4))
    first, last = first_linear(model), last_linear(model)
    assert first is not None
    assert last is not None
    assert first[1].in_features == 3072
    assert last[0] == "fc"
    assert model.get_submodule(first[0]) is first[1]
    assert len(linear_layers(model)) == 3
    assert first_linear(nn.Conv2d(1, 1, 1)) is None
    assert last_linear(nn.ReLU()) is None


def test_parameter_count_of_shared_and_frozen() -> None:
    layer = nn.Linear(3, 2)
    assert parameter_count(nn.Sequential(layer, nn.ReLU(), layer)) == 8
    layer.bias.requires_grad_(False)
    assert parameter_count(layer, trainable_only=True) == 6
