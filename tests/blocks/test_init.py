from __future__ import annotations

import torch

from leakatlas.blocks import init
from leakatlas.data import Box

BOX = Box((0.5, 0.4, 0.3), (0.2, 0.25, 0.1))
SHAPE = (64, 3, 8, 8)


def fresh(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normal_has_mean_zero_and_deviation_one() -> None:
    x = init.normal(SHAPE, generator=fresh(), like=torch.empty(0))
    assert x.shape == SHAPE
    assert abs(float(x.mean())) < 5 / x.numel() ** 0.5
    assert abs(float(x.std()) - 1) < 0.05


def test_same_generator_state_same_start_in_either_precision() -> None:
    single = init.normal(SHAPE, generator=fresh(), like=torch.empty(0))
    double = init.normal(SHAPE, generator=fresh(), like=torch.empty(0, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)
    assert not torch.equal(single, init.normal(SHAPE, generator=fresh(1), like=torch.empty(0)))


def test_uniform_fills_the_box() -> None:
    x = init.uniform(SHAPE, generator=fresh(), like=torch.empty(0), box=BOX)
    assert BOX.contains(x)
    pixels = BOX.denormalize(x)
    assert float(pixels.min()) < 0.01 and float(pixels.max()) > 0.99
    assert abs(float(pixels.mean()) - 0.5) < 0.02
    plain = init.uniform(SHAPE, generator=fresh(), like=torch.empty(0))
    torch.testing.assert_close(plain, pixels)


def test_grey_is_the_middle_of_the_box() -> None:
    like = torch.empty(0, dtype=torch.float64)
    x = init.grey((2, 3, 4, 4), like=like, box=BOX)
    torch.testing.assert_close(BOX.denormalize(x), torch.full_like(x, 0.5))
    assert not bool(init.grey((2, 3, 4, 4), like=like).any())
