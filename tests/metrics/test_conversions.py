"""Published conventions, brought back to [0, 1]."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import psnr, psnr_from_normalised, psnr_from_range
from leakatlas.metrics.images import psnr_of_mse


def test_known_offsets() -> None:
    assert psnr_from_range(20, low=-1, high=1) == pytest.approx(26.0206, abs=1e-4)
    assert psnr_from_range(20, low=0, high=255, peak=255) == 20
    assert psnr_from_normalised(0, [0.247] * 3) == pytest.approx(12.1, abs=0.1)
    assert psnr_from_normalised(0, [0.2] * 3) == pytest.approx(13.98, abs=0.01)


def test_a_round_trip_through_normalised_space() -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_hat = (torch.rand(1, 3, 8, 8, generator=generator) for _ in range(2))
    in_normalised_space = psnr_of_mse(((x_hat - x) / 0.25).square().mean())
    back = psnr_from_normalised(float(in_normalised_space), [0.25] * 3)
    assert back == pytest.approx(psnr(x_hat, x).item(), abs=1e-5)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(InvalidInput, match="high > low"):
        psnr_from_range(20, low=1, high=0)
    with pytest.raises(InvalidInput, match="positive standard deviations"):
        psnr_from_normalised(20, [0.2, 0.0])
