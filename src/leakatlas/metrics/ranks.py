"""Rank correlations with intervals, over all pairs or within groups only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import rankdata
from torch import Tensor

from leakatlas.metrics.intervals import Interval, bootstrap

FEWEST = 50
"""A correlation of fewer pairs is noise."""


class Correlation(NamedTuple):
    """Spearman's coefficient.

    Args:
        value: In [-1, 1].
        interval: 95 %, pairs resampled together.
        n: Pairs.
    """

    value: float
    interval: Interval
    n: int


def spearman(
    groups: Mapping[Any, Sequence[tuple[float, float]]],
    *,
    within: bool,
    generator: torch.Generator,
) -> Correlation | None:
    """Spearman's rank correlation of pairs that come in groups.

    Args:
        groups: Pairs ``(a, b)`` by group.
        within: Ranks are taken within each group, scaled to [-1, 1] and correlated together, so
            that differences between groups say nothing; groups whose ``a`` is constant are left
            out. Else all pairs are ranked together.
        generator: Of the bootstrap.

    Returns:
        None for fewer than :data:`FEWEST` pairs, or if one side is constant.
    """
    tables = [torch.tensor(list(pairs), dtype=torch.float64) for pairs in groups.values() if pairs]
    if within:
        varied = [pairs for pairs in tables if len(pairs[:, 0].unique()) > 1]
        tables = [2 * (_ranks(pairs, 0) - 1) / (len(pairs) - 1) - 1 for pairs in varied]
    pairs = torch.cat(tables) if tables else torch.empty(0, 2)
    if len(pairs) < FEWEST or bool((pairs == pairs[0]).all(dim=0).any()):
        return None

    def rho(picks: Tensor) -> Tensor:
        picked = pairs[picks.long()]
        return _pearson(picked if within else _ranks(picked, 1))

    where = torch.arange(len(pairs), dtype=torch.float64)
    value = float(rho(where[None])[0])
    low, high = bootstrap(where, generator=generator, statistic=rho)
    return Correlation(value, Interval(min(low, value), max(high, value)), len(pairs))


def _ranks(pairs: Tensor, axis: int) -> Tensor:
    return torch.from_numpy(rankdata(pairs.numpy(), axis=axis))


def _pearson(pairs: Tensor) -> Tensor:
    """Of pairs ``(R, N, 2)``; 0 where one side is constant."""
    a, b = (pairs - pairs.mean(1, keepdim=True)).unbind(-1)
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(size > 0, (a * b).sum(-1) / size.clamp(min=1e-300), torch.zeros_like(size))
