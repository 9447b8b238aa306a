"""Hand-derived values, agreement with named libraries, degenerate images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from torchmetrics.functional import image as reference

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.metrics import (
    ms_ssim,
    mse,
    psnr,
    registered_psnr,
    rmse,
    spectral_bands,
    spectral_distance,
    ssim,
)
from leakatlas.metrics.images import PSNR_CAP

astronaut: Any = skimage.data.astronaut
structural_similarity: Any = skimage.metrics.structural_similarity
peak_signal_noise_ratio: Any = skimage.metrics.peak_signal_noise_ratio
Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PLAIN: list[Metric] = [mse, rmse, psnr, spectral_distance]


def photo(side: int = 64) -> torch.Tensor:
    """A crop of the bundled astronaut photograph, ``(1, 3, side, side)`` float64."""
    whole = torch.from_numpy(np.array(astronaut()))
    return whole[:side, 150 : 150 + side].permute(2, 0, 1)[None].double() / 255


def noisy(x: torch.Tensor, std: float = 0.1, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return (x + std * noise).clamp(0, 1)


def test_4_constant_offset_of_a_tenth_is_20_db() -> None:
    x = 0.8 * photo()
    # MSE = 0.1^2 = 1e-2, and -10 log10(1e-2) = 20
    torch.testing.assert_close(
        psnr(x + 0.1, x), torch.tensor([20.0], dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_4_normalisation_round_trip_changes_nothing() -> None:
    x, x_hat = photo(), noisy(photo())
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).reshape(1, 3, 1, 1)
    back = ((x_hat - mean) / std * std + mean).clamp(0, 1)
    torch.testing.assert_close(psnr(back, x), psnr(x_hat, x), rtol=0, atol=1e-9)


def test_4_an_exact_image_scores_the_cap() -> None:
    assert psnr(photo(), photo()).item() == PSNR_CAP


def test_mse_by_hand() -> None:
    x = torch.tensor([0.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    x_hat = torch.tensor([0.0, 0.5, 0.5, 1.0]).reshape(1, 1, 2, 2)
    assert mse(x_hat, x).item() == pytest.approx((0.25 + 0.25 + 1) / 4)
    assert rmse(x_hat, x).item() == pytest.approx(math.sqrt(0.375))


def test_mean_of_psnrs_is_not_the_psnr_of_the_mean_error() -> None:
    # one image of MSE 1e-6, seven of 0.05: (60 + 7 * 13.0103) / 8 = 18.88 against 13.59
    error = torch.tensor([1e-6] + [0.05] * 7, dtype=torch.float64)
    x_hat = error.sqrt().reshape(8, 1, 1, 1)
    values = psnr(x_hat, torch.zeros(8, 1, 1, 1))
    assert values.mean().item() == pytest.approx(18.884, abs=1e-3)
    assert -10 * math.log10(mse(x_hat, torch.zeros(8, 1, 1, 1)).mean()) == pytest.approx(
        13.590, abs=1e-3
    )


def test_psnr_agrees_with_torchmetrics() -> None:
    x = photo().repeat(3, 1, 1, 1)
    x_hat = torch.cat([noisy(photo(), std) for std in (0.01, 0.1, 0.4)])
    each = reference.peak_signal_noise_ratio(
        x_hat, x, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    # torchmetrics keeps the data range in float32, hence relative and not absolute
    torch.testing.assert_close(psnr(x_hat, x), each, rtol=1e-6, atol=0)


def test_psnr_agrees_with_skimage() -> None:
    x, x_hat = photo(), noisy(photo())
    expected = peak_signal_noise_ratio(x[0].numpy(), x_hat[0].numpy(), data_range=1.0)
    assert psnr(x_hat, x).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [11, 32, 64])
def test_6_ssim_agrees_with_skimage(channels: int, side: int) -> None:
    x = photo(side)[:, [0, 1, 2, 0][:channels]]
    x_hat = noisy(x, 0.2)
    expected = structural_similarity(
        x_hat[0].numpy(), x[0].numpy(), gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=1.0, channel_axis=0,
    )  # fmt: skip
    assert ssim(x_hat, x).item() == pytest.approx(expected, abs=1e-6)


def test_6_ssim_agrees_with_torchmetrics_at_either_border() -> None:
    x, x_hat = photo(), noisy(photo(), 0.2)
    plain, whole = reference.structural_similarity_index_measure(
        x_hat, x, data_range=1.0, return_full_image=True
    )
    assert isinstance(plain, torch.Tensor) and isinstance(whole, torch.Tensor)
    assert ssim(x_hat, x, border="reflect").item() == pytest.approx(float(plain), abs=1e-6)
    inner = float(whole[..., 5:-5, 5:-5].mean())
    assert ssim(x_hat, x).item() == pytest.approx(inner, abs=1e-6)
    assert abs(inner - float(plain)) > 1e-6  # two conventions, two numbers


def test_ssim_of_two_constants_by_hand() -> None:
    # no variance: only luminance (2ab + c1) / (a^2 + b^2 + c1) with c1 = 1e-4 remains
    a, b = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a).item() == pytest.approx(1.0)


def test_ms_ssim_agrees_with_torchmetrics_and_refuses_small_images() -> None:
    x = photo(176)
    x_hat = noisy(x, 0.1)
    expected = reference.multiscale_structural_similarity_index_measure(x_hat, x, data_range=1.0)
    assert ms_ssim(x_hat, x).item() == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(InvalidInput, match="at least 176 pixels"):
        ms_ssim(photo(175), photo(175))


def test_spectral_distance_is_blind_to_shifts_and_psnr_is_not() -> None:
    x = photo()
    shifted = x.roll((5, 9), dims=(2, 3))
    assert spectral_distance(shifted, x).item() < 1e-12
    assert psnr(shifted, x).item() < 20
    assert spectral_distance(noisy(x), x).item() > 0.01


def test_spectral_distance_by_hand() -> None:
    # 1x1: F x = x, so the distance is log(1 + 1) - log(1 + 0.5)
    x = torch.full((1, 1, 1, 1), 0.5)
    expected = math.log(2) - math.log(1.5)
    assert spectral_distance(torch.ones(1, 1, 1, 1), x).item() == pytest.approx(expected)


def test_spectral_bands_find_the_lost_frequencies() -> None:
    x = photo()
    blurred = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    low, *_, high = spectral_bands(blurred, x, bands=4)[0].tolist()
    assert spectral_bands(blurred, x, bands=1)[0, 0].item() == pytest.approx(
        spectral_distance(blurred, x).item()
    )
    size = spectral_bands(torch.zeros_like(x), x, bands=4)[0]
    assert high / size[-1].item() > 0.2 > low / size[0].item()


@pytest.mark.parametrize("shift", [(2, -3), (-4, 5), (0, 7)])
def test_registered_psnr_finds_the_translation(shift: tuple[int, int]) -> None:
    x = photo()
    found = registered_psnr(x.roll(shift, dims=(2, 3)), x)
    assert found.shift[0].tolist() == [-shift[0], -shift[1]]
    assert found.psnr.item() > found.raw.item() + 3
    assert found.raw.item() == pytest.approx(psnr(x.roll(shift, dims=(2, 3)), x).item())


def test_registered_psnr_never_falls_below_raw() -> None:
    x = photo().repeat(4, 1, 1, 1)
    x_hat = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    found = registered_psnr(x_hat, x)
    assert (found.psnr >= found.raw).all()
    constant = registered_psnr(torch.full_like(x, 0.5), x)
    assert torch.equal(constant.psnr, constant.raw) and not constant.shift.any()


@pytest.mark.parametrize("metric", [*PLAIN, ssim])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("side", [11, 224])
def test_any_number_of_channels_and_size(metric: Metric, channels: int, side: int) -> None:
    x = photo(side)[:, [0, 1, 2, 0][:channels]]
    assert torch.isfinite(metric(noisy(x), x)).all()


@pytest.mark.parametrize("metric", PLAIN)
def test_eight_by_eight_is_defined(metric: Metric) -> None:
    assert torch.isfinite(metric(noisy(photo(8)), photo(8))).all()


def test_eight_by_eight_ssim_needs_the_other_border() -> None:
    with pytest.raises(InvalidInput, match="at least 11 pixels"):
        ssim(photo(8), photo(8))
    assert ssim(photo(8), photo(8), border="reflect").item() == pytest.approx(1.0)
    with pytest.raises(InvalidInput, match="at least 6 pixels"):
        ssim(photo(5), photo(5), border="reflect")


@pytest.mark.parametrize("metric", [*PLAIN, ssim, ms_ssim])
def test_no_images_give_no_values(metric: Metric) -> None:
    nothing = torch.zeros(0, 3, 176, 176)
    assert metric(nothing, nothing).shape == (0,)


@pytest.mark.parametrize("metric", [*PLAIN, ssim, ms_ssim, spectral_bands, registered_psnr])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * torch.nan, "NaN or infinite"),
        (lambda x: x + 1.5, r"must lie in \[0, 1\]"),
        (lambda x: (x * 255).byte(), "divide 8-bit pixels by 255"),
        (lambda x: x[0], r"must be images \(N, C, H, W\)"),
        (lambda x: x.repeat(2, 1, 1, 1), "must have one shape"),
    ],
)
def test_what_is_no_image_is_refused_by_name(
    metric: Metric, spoil: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        metric(spoil(photo(176)), photo(176))


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(InvalidParameter, match="border="):
        ssim(photo(), photo(), border="zero")  # type: ignore[arg-type]  # the wrong value is the test
    with pytest.raises(InvalidParameter, match="bands="):
        spectral_bands(photo(), photo(), bands=0)
    with pytest.raises(InvalidParameter, match="max_shift="):
        registered_psnr(photo(), photo(), max_shift=2)
