"""Confidence intervals for means, medians and rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput, InvalidParameter

CHUNK = 2**22
"""Resampled values held at once; bounds memory at 32 MiB."""


class Interval(NamedTuple):
    """A two-sided confidence interval, ends included."""

    low: float
    high: float


def _level(who: str, level: float) -> None:
    if not 0 < level < 1:
        raise InvalidParameter(f"{who}(level={level}): expected a share between 0 and 1, say 0.95.")


def row_mean(values: Tensor) -> Tensor:
    """Mean over the last dimension, the default statistic of :func:`bootstrap`."""
    return values.mean(dim=-1)


def row_median(values: Tensor) -> Tensor:
    """Median over the last dimension (midpoint of the two middle values)."""
    return values.quantile(0.5, dim=-1)


def bootstrap(
    values: Tensor,
    *,
    generator: torch.Generator,
    statistic: Callable[[Tensor], Tensor] = row_mean,
    level: float = 0.95,
    resamples: int = 2_000,
) -> Interval:
    """Percentile bootstrap interval of a statistic.

    With one value the interval has width 0: it says how the sample varies, and one value does not
    vary. Report the number of values beside it.

    Args:
        values: The sample ``(N,)``, finite.
        generator: Source of the resampling (on the CPU); same generator state, same interval.
        statistic: Maps ``(R, N)`` resamples to ``(R,)`` values.
        level: Coverage.
        resamples: Number R of resamples.
    """
    _level("bootstrap", level)
    if resamples < 1:
        raise InvalidParameter(f"bootstrap(resamples={resamples}): expected a positive number.")
    if values.ndim != 1 or values.numel() == 0 or not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"bootstrap: expected a non-empty vector of finite values, got shape "
            f"{tuple(values.shape)}; replace failures by their baseline score first."
        )
    sample = values.detach().double().cpu()
    rows = max(1, CHUNK // sample.numel())
    parts = [
        statistic(
            sample[torch.randint(sample.numel(), (min(rows, resamples - done), sample.numel()),
                                 generator=generator)]
        )
        for done in range(0, resamples, rows)
    ]  # fmt: skip
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(parts).quantile(tails).tolist()
    return Interval(low, high)


def binomial(
    successes: int,
    trials: int,
    *,
    level: float = 0.95,
    method: Literal["wilson", "exact"] = "wilson",
) -> Interval:
    """Interval of a success probability (SciPy).

    Args:
        successes: Number of successes.
        trials: Number of independent trials.
        level: Coverage.
        method: ``"wilson"`` (score interval, good at small counts) or ``"exact"``
            (Clopper-Pearson, never covers less than ``level``).
    """
    _level("binomial", level)
    if method not in ("wilson", "exact"):
        raise InvalidParameter(f"binomial(method={method!r}): expected 'wilson' or 'exact'.")
    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidInput(
            f"binomial: expected 0 <= successes <= trials with trials > 0, got {successes} of "
            f"{trials}."
        )
    from scipy.stats import binomtest  # most of a second to import

    found = binomtest(successes, trials).proportion_ci(confidence_level=level, method=method)
    return Interval(float(found.low), float(found.high))
