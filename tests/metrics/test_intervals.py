"""Intervals against closed forms and published values."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.metrics import binomial, bootstrap
from leakatlas.metrics.intervals import row_median


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_wilson_by_hand() -> None:
    # 1 of 10, z = 1.959964: centre (p + z^2/2n) / (1 + z^2/n) = 0.21110, half width 0.19322
    low, high = binomial(1, 10)
    assert (low, high) == pytest.approx((0.01788, 0.40415), abs=1e-5)


def test_clopper_pearson_by_hand() -> None:
    # no success in n: the upper end solves (1 - p)^n = 0.025
    low, high = binomial(0, 20, method="exact")
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_bootstrap_of_the_mean_matches_the_normal_interval() -> None:
    values = torch.randn(400, generator=seeded(1))
    low, high = bootstrap(values, generator=seeded(), resamples=4_000)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.01)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.01)


def test_bootstrap_covers_about_as_often_as_it_says() -> None:
    generator = seeded(2)
    hits = 0
    for _ in range(200):
        sample = torch.rand(30, generator=generator)
        low, high = bootstrap(sample, generator=generator, level=0.9, resamples=300)
        hits += low <= 0.5 <= high
    assert 165 <= hits <= 195  # 180 expected, standard deviation 4.2; percentile runs a bit short


def test_bootstrap_is_reproducible_and_chunks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(10, generator=seeded(3))
    whole = bootstrap(values, generator=seeded(4), resamples=500)
    assert bootstrap(values, generator=seeded(4), resamples=500) == whole
    monkeypatch.setattr("leakatlas.metrics.intervals.CHUNK", 100)
    assert bootstrap(values, generator=seeded(4), resamples=500) == pytest.approx(whole, abs=0.05)


def test_one_value_has_no_width() -> None:
    assert bootstrap(torch.tensor([3.0]), generator=seeded()) == (3.0, 3.0)


def test_median_is_another_statistic() -> None:
    values = torch.tensor([0.0] * 9 + [100.0])
    assert bootstrap(values, generator=seeded(), statistic=row_median).high < 50
    assert bootstrap(values, generator=seeded()).high > 20


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidInput, match="finite values"):
        bootstrap(torch.tensor([1.0, torch.nan]), generator=seeded())
    with pytest.raises(InvalidInput, match="non-empty"):
        bootstrap(torch.zeros(0), generator=seeded())
    with pytest.raises(InvalidParameter, match="level="):
        bootstrap(torch.ones(2), generator=seeded(), level=95)
    with pytest.raises(InvalidParameter, match="resamples="):
        bootstrap(torch.ones(2), generator=seeded(), resamples=0)
    with pytest.raises(InvalidInput, match="3 of 2"):
        binomial(3, 2)
    with pytest.raises(InvalidParameter, match="method="):
        binomial(1, 2, method="wald")  # type: ignore[arg-type]  # the wrong value is the test
