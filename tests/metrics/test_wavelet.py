"""CW-SSIM: the pyramid tiles the plane, the measure ignores shifts and sees structure."""

from __future__ import annotations

import math

import pytest
import torch

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.metrics import cw_ssim, ssim
from leakatlas.metrics.wavelet import angular, radial_high, radial_low, subbands

from .test_images import noisy, photo


def test_radial_bands_and_residuals_add_up_to_one() -> None:
    radius = torch.linspace(0.01, math.pi * 1.4, 500, dtype=torch.float64)
    total = radial_high(radius, 0).square()
    for level in (1, 2, 3):
        total += (radial_low(radius, level - 1) * radial_high(radius, level)).square()
    total += radial_low(radius, 3).square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("orientations", [2, 4, 16])
def test_orientations_tile_every_direction_equally(orientations: int) -> None:
    theta = torch.linspace(-math.pi, math.pi, 360, dtype=torch.float64)
    total = torch.zeros_like(theta)
    for k in range(orientations):
        for side in (0, math.pi):
            total += angular(theta + side, k, orientations).square()
    torch.testing.assert_close(total, torch.full_like(total, 4.0), rtol=0, atol=1e-9)


def test_a_grating_lands_in_its_scale_and_orientation() -> None:
    columns = torch.arange(64, dtype=torch.float64)
    wave = 0.5 + 0.4 * torch.cos(2 * math.pi * columns * 8 / 64)  # radius pi/4: centre of scale 2
    vertical = wave.expand(1, 1, 64, 64)
    fine, coarse = (b.abs().square().mean(dim=(-2, -1))[0, 0] for b in subbands(vertical))
    assert coarse.argmax() == 0 and coarse[0] > 100 * fine.max()
    across = subbands(vertical.transpose(2, 3))[1].abs().square().mean(dim=(-2, -1))[0, 0]
    assert across.argmax() == 8  # of 16: ninety degrees


def test_a_change_of_contrast_by_hand() -> None:
    # coefficients scale by a, so every window scores 2a / (1 + a^2)
    for a in (0.9, 0.5):
        assert cw_ssim(a * photo(), photo()).item() == pytest.approx(2 * a / (1 + a * a), abs=1e-9)


def test_brightness_alone_changes_nothing() -> None:
    x = 0.8 * photo()
    assert cw_ssim(x + 0.1, x).item() == pytest.approx(1, abs=1e-9)


def test_a_shift_costs_less_than_it_costs_ssim_and_noise_costs_more() -> None:
    x = photo(64)
    shifted = x.roll((1, 1), dims=(2, 3))
    assert cw_ssim(shifted, x).item() > ssim(shifted, x).item() + 0.1
    assert cw_ssim(shifted, x).item() > 0.8
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert cw_ssim(noise, x).item() < 0.5
    assert cw_ssim(noisy(x, 0.05), x).item() > cw_ssim(noisy(x, 0.3), x).item()


def test_degenerate_images() -> None:
    flat = torch.full((2, 4, 16, 16), 0.3)
    assert cw_ssim(flat, flat + 0.2).tolist() == [1.0, 1.0]
    assert cw_ssim(flat, torch.rand(2, 4, 16, 16)).max().item() < 0.01
    assert cw_ssim(flat[:0], flat[:0]).shape == (0,)
    with pytest.raises(InvalidInput, match="at least 13 pixels"):
        cw_ssim(photo(8), photo(8))
    assert cw_ssim(photo(8), photo(8), scales=1).item() == pytest.approx(1)
    with pytest.raises(InvalidParameter, match="must be positive"):
        cw_ssim(photo(), photo(), window=0)
    with pytest.raises(InvalidInput, match="NaN"):
        cw_ssim(photo() * torch.nan, photo())


def test_odd_sides_are_defined() -> None:
    x = photo(33)[..., :29]
    assert cw_ssim(x, x).item() == pytest.approx(1)
