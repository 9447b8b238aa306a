"""What counts as a success."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import asr, exact, in_ball, pixel_exact, recovered, relative_error


def test_relative_error_by_hand() -> None:
    x = torch.tensor([0.6, 0.8]).reshape(1, 1, 1, 2)  # norm 1
    assert relative_error(x + 0.03, x).item() == pytest.approx((2 * 0.03**2) ** 0.5, rel=1e-5)
    black = torch.zeros(1, 1, 2, 2)
    assert relative_error(black + 0.1, black).item() == pytest.approx(0.2)  # plain norm


def test_exact_is_inclusive_and_relative() -> None:
    x = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    assert exact(x * (1 + 0.9e-3), x, eps=1e-3).all()
    assert not exact(x * (1 + 1.1e-3), x, eps=1e-3).any()


def test_pixel_exact_forgives_less_than_half_a_level() -> None:
    x = torch.full((1, 1, 2, 2), 100 / 255, dtype=torch.float64)
    assert pixel_exact(x + 0.4 / 255, x).all()
    one_off = x.clone()
    one_off[0, 0, 0, 0] += 1 / 255
    assert not pixel_exact(one_off, x).any()


def test_ball_is_absolute() -> None:
    x = torch.zeros(1, 1, 2, 2)
    assert in_ball(x + 0.25, x, radius=0.5).all()  # sqrt(4 * 0.25^2) = 0.5
    assert not in_ball(x + 0.26, x, radius=0.5).any()


def test_asr_counts_the_threshold_itself_and_failures() -> None:
    values = torch.tensor([20.0, 19.9, torch.nan, 31.0])
    assert asr(values, tau=20) == 0.5
    with pytest.raises(InvalidInput, match="at least one original"):
        asr(torch.zeros(0), tau=20)


def test_recovered_counts_duplicates_once() -> None:
    # outputs 0 and 1 both copy original 0, output 2 copies nothing, output 3 is not finite
    errors = torch.tensor([[0.0, 1.0], [1e-4, 1.0], [0.5, 0.5], [torch.nan, torch.nan]])
    found = recovered(errors, eps=1e-3)
    assert (found.outputs, found.exact, found.unique) == (4, 2, 1)
    assert (found.recall, found.precision) == (0.5, 0.5)


def test_recovered_of_nothing_has_no_precision() -> None:
    found = recovered(torch.zeros(0, 3))
    assert (found.exact, found.unique, found.recall, found.precision) == (0, 0, 0.0, None)
    with pytest.raises(InvalidInput, match="B > 0"):
        recovered(torch.zeros(3, 0))
