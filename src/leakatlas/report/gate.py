"""Conditions on an audit's scores, for continuous integration: ``P(psnr > 20 dB) > 0.05``."""

from __future__ import annotations

import operator
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from leakatlas.errors import InvalidParameter, UnknownName

METRICS = ("psnr", "ssim", "mse", "exact")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "max": max,
    "min": min,
}
_NUMBER = r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_COMPARISON = rf"(>=|<=|>|<)\s*{_NUMBER}\s*(?:dB)?"
_PROBABILITY = re.compile(rf"P\(\s*(\w+)\s*{_COMPARISON}\s*\)\s*{_COMPARISON}", re.IGNORECASE)
_STATISTIC = re.compile(rf"(\w+)\(\s*(\w+)\s*\)\s*{_COMPARISON}", re.IGNORECASE)
_COUNT = re.compile(rf"exact\s*{_COMPARISON}", re.IGNORECASE)


@dataclass(frozen=True)
class Gate:
    """A condition that fails a build when it holds.

    Args:
        text: As written.
        value: Computes the left-hand side from per-image worst-case scores; None without any.
        compare: The outer comparison.
        threshold: Its right-hand side.
    """

    text: str
    value: Callable[[Mapping[str, Sequence[float]]], float | None]
    compare: Callable[[float, float], bool]
    threshold: float

    def holds(self, scores: Mapping[str, Sequence[float]]) -> bool:
        """Whether the condition is met; never where no image was attacked.

        Args:
            scores: Per metric, one worst-case value an original image.
        """
        value = self.value(scores)
        return value is not None and self.compare(value, self.threshold)


def parse_gate(text: str) -> Gate:
    """Read a condition.

    Three forms: ``P(psnr > 20 dB) > 0.05`` (share of images whose worst case passes),
    ``mean(ssim) > 0.5`` (also median, max, min), ``exact > 0`` (number of exactly recovered
    images). Metrics: psnr, ssim, mse, exact.

    Raises:
        InvalidParameter: If the text has none of these forms.
        UnknownName: If the metric or statistic does not exist.
    """
    stripped = text.strip()
    if match := _PROBABILITY.fullmatch(stripped):
        metric, inner, level, outer, threshold = match.groups()
        metric = _metric(metric)

        def share(scores: Mapping[str, Sequence[float]]) -> float | None:
            values = scores[metric]
            passed = sum(_COMPARE[inner](value, float(level)) for value in values)
            return passed / len(values) if values else None

        return Gate(stripped, share, _COMPARE[outer], float(threshold))
    if match := _STATISTIC.fullmatch(stripped):
        name, metric, outer, threshold = match.groups()
        metric = _metric(metric)
        if name.lower() not in _STATISTICS:
            raise UnknownName("statistic", name, [*_STATISTICS, "P"])
        reduce = _STATISTICS[name.lower()]
        return Gate(
            stripped,
            lambda scores: reduce(scores[metric]) if scores[metric] else None,
            _COMPARE[outer],
            float(threshold),
        )
    if match := _COUNT.fullmatch(stripped):
        outer, threshold = match.groups()
        return Gate(
            stripped,
            lambda scores: sum(scores["exact"]) if scores["exact"] else None,
            _COMPARE[outer],
            float(threshold),
        )
    raise InvalidParameter(
        f"The condition {text!r} cannot be read; write 'P(psnr > 20 dB) > 0.05', "
        "'mean(ssim) > 0.5' or 'exact > 0'."
    )


def _metric(name: str) -> str:
    if name.lower() not in METRICS:
        raise UnknownName("metric", name, METRICS)
    return name.lower()
