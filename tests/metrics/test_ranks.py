"""Rank correlations: against SciPy, and within groups only where that is asked for."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from leakatlas.metrics.ranks import FEWEST, spearman


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_pooled_is_scipys_and_lies_in_its_interval() -> None:
    a = torch.randn(80, generator=seeded()).round(decimals=1)  # with ties
    b = a + torch.randn(80, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    found = spearman({"x": pairs[:30], "y": pairs[30:]}, within=False, generator=seeded())
    assert found is not None and found.n == 80
    assert found.value == pytest.approx(float(spearmanr(a, b).statistic), abs=1e-12)
    low, high = found.interval
    assert low <= found.value <= high and high - low < 0.5


def test_within_groups_only_the_order_inside_counts() -> None:
    up = [(float(i), float(i)) for i in range(FEWEST)]
    groups = {"low": up, "high": [(a + 100, b - 1_000) for a, b in up]}
    pooled = spearman(groups, within=False, generator=seeded())
    inside = spearman(groups, within=True, generator=seeded())
    assert pooled is not None and pooled.value < 0
    assert inside is not None and inside.value == pytest.approx(1)


def test_too_few_pairs_and_constant_sides_have_none() -> None:
    few = {"x": [(float(i), float(i)) for i in range(FEWEST - 1)]}
    assert spearman(few, within=False, generator=seeded()) is None
    flat = {"x": [(1.0, float(i)) for i in range(FEWEST)]}
    assert spearman(flat, within=False, generator=seeded()) is None
    assert spearman(flat, within=True, generator=seeded()) is None
