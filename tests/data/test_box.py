import json
from typing import Any

import pytest
import torch

from leakatlas.data import CIFAR10, Box
from leakatlas.errors import InvalidInput, InvalidParameter

BOX = Box(mean=(0.5, 0.25), std=(0.2, 0.5))


def test_normalize_is_the_formula_and_denormalize_its_inverse() -> None:
    images = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    x = BOX.normalize(images)
    assert torch.allclose(x[:, 0], (images[:, 0] - 0.5) / 0.2)
    assert torch.allclose(x[:, 1], (images[:, 1] - 0.25) / 0.5)
    assert torch.allclose(BOX.denormalize(x), images, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_and_leading_shape_follow_the_input(dtype: torch.dtype) -> None:
    for shape in ((2, 4, 4), (3, 2, 4, 4), (5, 3, 2, 4, 4)):
        x = torch.zeros(shape, dtype=dtype)
        for result in (BOX.normalize(x), BOX.denormalize(x), BOX.clip(x)):
            assert result.dtype == dtype
            assert result.shape == shape


def test_clip_projects_each_channel_onto_its_own_range() -> None:
    x = torch.tensor([-100.0, 0.1, 100.0]).repeat(2, 1).view(1, 2, 1, 3)
    clipped = BOX.clip(x)
    low, high = BOX.bounds(x)
    assert torch.allclose(low.flatten(), torch.tensor([-2.5, -0.5]))
    assert torch.allclose(high.flatten(), torch.tensor([2.5, 1.5]))
    assert torch.equal(clipped[0, :, 0, 0], low.flatten())
    assert torch.equal(clipped[0, :, 0, 1], torch.tensor([0.1, 0.1]))
    assert torch.equal(clipped[0, :, 0, 2], high.flatten())
    assert BOX.contains(clipped)
    assert not BOX.contains(x)
    assert torch.equal(BOX.clip(clipped), clipped)


def test_low_and_high_move_the_bounds() -> None:
    low, high = Box((0.0,), (1.0,), low=-1.0, high=2.0).bounds(torch.zeros(1, 1, 1))
    assert (low.item(), high.item()) == (-1.0, 2.0)


def test_unit_changes_nothing_inside_the_range() -> None:
    images = torch.rand(2, 3, 4, 4)
    box = Box.unit(3)
    assert box.channels == 3
    assert torch.equal(box.normalize(images), images)
    assert torch.equal(box.clip(images), images)


def test_json_round_trip() -> None:
    box = Box((0.1, 0.2), (0.3, 0.4), -0.5, 0.9)
    assert Box.from_json(json.loads(json.dumps(box.to_json()))) == box
    assert Box.from_json({"mean": [0], "std": [1]}) == Box.unit(1)
    assert hash(CIFAR10) == hash(Box.from_json(CIFAR10.to_json()))


@pytest.mark.parametrize(
    "values",
    [
        {"mean": [0.0]},
        {"mean": [0.0], "std": [1.0], "bias": 3},
        {"mean": 0.0, "std": [1.0]},
        {"mean": "0", "std": [1.0]},
        {"mean": ["a"], "std": [1.0]},
    ],
)
def test_foreign_json_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        Box.from_json(values)


@pytest.mark.parametrize(
    "mean,std,low,high,word",
    [
        ((), (), 0, 1, "one mean"),
        ((0.0,), (1.0, 1.0), 0, 1, "1 means and 2 stds"),
        ((0.0,), (0.0,), 0, 1, "positive"),
        ((float("nan"),), (1.0,), 0, 1, "finite"),
        ((0.0,), (1.0,), 1, 1, "low < high"),
    ],
)
def test_impossible_boxes_are_refused(
    mean: tuple[float, ...], std: tuple[float, ...], low: float, high: float, word: str
) -> None:
    with pytest.raises(InvalidParameter, match=word):
        Box(mean, std, low, high)


@pytest.mark.parametrize("shape", [(3, 4, 4), (4, 4), (1, 1, 4, 4)])
def test_wrong_channels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="2 channels"):
        BOX.clip(torch.zeros(shape))
