from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import priors

X = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_tv_mean_by_a_naive_loop() -> None:
    horizontal, vertical = [], []
    for image in X:
        for channel in image:
            rows, columns = channel.shape
            for i in range(rows):
                for j in range(columns):
                    if j + 1 < columns:
                        horizontal.append(abs(float(channel[i, j + 1] - channel[i, j])))
                    if i + 1 < rows:
                        vertical.append(abs(float(channel[i + 1, j] - channel[i, j])))
    expected = sum(horizontal) / len(horizontal) + sum(vertical) / len(vertical)
    assert float(priors.tv_mean(X)) == pytest.approx(expected, rel=1e-12)


def test_tv_four_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0], [3.0, 7.0]], dtype=torch.float64).view(1, 1, 2, 2)
    # right (1, 4), down (3, 6), diagonal 7 - 0, anti-diagonal 3 - 1
    assert float(priors.tv_four(x, "l2")) == pytest.approx(17**0.5 + 45**0.5 + 7 + 2, rel=1e-6)
    assert float(priors.tv_four(x, "l1")) == pytest.approx(2.5 + 4.5 + 7 + 2)


def test_l2_norm_is_a_mean_over_images() -> None:
    expected = (X[0].norm() + X[1].norm()) / 2
    torch.testing.assert_close(priors.l2_norm(X), expected, rtol=1e-6, atol=0)
    assert float(priors.l2_norm(torch.zeros(2, 3, 4, 4))) == 0


@pytest.mark.parametrize("tv", [priors.tv_mean, priors.tv_four, lambda x: priors.tv_four(x, "l1")])
class TestTotalVariation:
    def test_blind_to_a_constant(self, tv: Callable[[Tensor], Tensor]) -> None:
        assert float(tv(torch.full((2, 3, 4, 4), 0.7))) == 0
        torch.testing.assert_close(tv(X + 5), tv(X))

    def test_grows_in_proportion_to_contrast(self, tv: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(tv(3 * X), 3 * tv(X), rtol=1e-6, atol=0)

    def test_indifferent_to_mirroring(self, tv: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(tv(X.flip(-1)), tv(X))
        torch.testing.assert_close(tv(X.flip(-2)), tv(X))

    def test_gradient(self, tv: Callable[[Tensor], Tensor]) -> None:
        assert torch.autograd.gradcheck(tv, X.clone().requires_grad_())

    def test_finite_slope_on_a_constant_image(self, tv: Callable[[Tensor], Tensor]) -> None:
        flat = torch.zeros(1, 1, 4, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(tv(flat), flat)
        assert float(slope.abs().max()) == 0

    def test_one_pixel_has_no_variation(self, tv: Callable[[Tensor], Tensor]) -> None:
        assert float(tv(torch.ones(1, 3, 1, 1))) == 0
