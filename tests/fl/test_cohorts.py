from __future__ import annotations

import pytest
from scipy.stats import binomtest

from leakatlas.errors import InvalidParameter
from leakatlas.fl import poisson_cohort, stream, uniform_cohort

CLIENTS = range(10, 20)


def test_uniform_cohorts_have_their_size_and_reach_everyone_alike() -> None:
    generator = stream("test")
    drawn = [uniform_cohort(CLIENTS, 3, generator) for _ in range(2_000)]
    assert all(len(set(cohort)) == 3 and set(cohort) <= set(CLIENTS) for cohort in drawn)
    for client in CLIENTS:
        hits = sum(client in cohort for cohort in drawn)
        assert binomtest(hits, 2_000, 0.3).pvalue > 1e-4


def test_poisson_cohorts_vary_in_size_with_the_right_mean_and_variance() -> None:
    generator = stream("test")
    sizes = [len(poisson_cohort(CLIENTS, 0.3, generator)) for _ in range(2_000)]
    mean = sum(sizes) / 2_000
    variance = sum((size - mean) ** 2 for size in sizes) / 1_999
    assert mean == pytest.approx(3.0, abs=0.15)
    assert variance == pytest.approx(2.1, abs=0.3)  # n q (1 - q); a fixed size would give 0
    assert 0 in sizes


def test_the_same_stream_draws_the_same_cohort() -> None:
    assert uniform_cohort(CLIENTS, 4, stream(1)) == uniform_cohort(CLIENTS, 4, stream(1))
    assert poisson_cohort(CLIENTS, 1.0, stream(1)) == tuple(CLIENTS)


def test_impossible_cohorts_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="cannot be drawn from 10"):
        uniform_cohort(CLIENTS, 11, stream(0))
    with pytest.raises(InvalidParameter, match="in \\(0, 1\\]"):
        poisson_cohort(CLIENTS, 0.0, stream(0))
