"""Thresholds of the checks: measured on benign models by ``studies/lint``, never typed.

``thresholds.json`` lies in the package. For each statistic it holds the largest value on the
calibration half of the benign models, and the threshold, which halves what is left between that
value and certainty: ``t = 1 - (1 - largest) / 2``. A statistic is *context only*, and raises no
alarm (threshold 1), if benign models come closer to certainty than :data:`NEAR`, or if one group
of them exceeds the threshold that the others alone would set. Tampered models play no part.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from leakatlas import reading
from leakatlas.errors import InvalidInput
from leakatlas.lint.findings import COMPARISONS, STATISTICS

FILE = Path(str(resources.files("leakatlas.lint") / "thresholds.json"))


@dataclass(frozen=True)
class Calibration:
    """Thresholds and where they come from.

    Args:
        thresholds: By statistic; a score above it is a finding.
        provenance: Benign set, rule, number of models, command and date, as the study wrote them.
    """

    thresholds: Mapping[str, float]
    provenance: Mapping[str, Any]


NEAR = 0.1
"""A statistic on which a benign model is nearer to certainty than this decides nothing."""


RULE = (
    "The threshold halves what is left between the largest value on the calibration half of the "
    "benign models and certainty: t = 1 - (1 - largest) / 2 (quantile 1, plus that margin). A "
    f"statistic is context only (threshold 1) if a benign model exceeds {1 - NEAR:g}, or if one "
    "run exceeds the threshold that all others set. Tampered models play no part."
)


def threshold_of(largest: float) -> float:
    """Half-way from the largest benign value to certainty."""
    return 1 - (1 - largest) / 2


def calibrated(largest_by_group: Mapping[str, float]) -> float:
    """The threshold of a statistic; 1 if it is context only.

    Args:
        largest_by_group: Largest value in every group of benign models that belong together.
    """
    ordered = sorted(largest_by_group.values())
    if not ordered:
        return 1.0
    largest, others = ordered[-1], max(ordered[:-1], default=0.0)
    if largest > 1 - NEAR or largest > threshold_of(others):
        return 1.0
    return threshold_of(largest)


def read(path: Path = FILE) -> Calibration:
    """The calibration in a file.

    Raises:
        InvalidInput: If the file is damaged or lacks a statistic.
    """
    try:
        content = reading.read_json(path, what="calibration")
        rows = content.pop("statistics")
        thresholds = {name: float(row["threshold"]) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InvalidInput(
            f"{path}: not a calibration of lint ({problem}); reinstall, or run the study lint."
        ) from None
    # Comparisons are 0 or 1: any difference counts.
    thresholds.update(dict.fromkeys(COMPARISONS, threshold_of(0.0)))
    missing = sorted(set(STATISTICS) - set(thresholds))
    if missing:
        raise InvalidInput(f"{path}: no threshold for {missing[0]!r}; run the study lint.")
    return Calibration(thresholds, content)


def fingerprint(thresholds: Mapping[str, float]) -> int:
    """A checksum (CRC-32) of the measured thresholds, to six decimals."""
    table = sorted((n, round(t, 6)) for n, t in thresholds.items() if n not in COMPARISONS)
    return zlib.crc32(repr(table).encode())


@functools.cache
def shipped() -> Calibration:
    """The calibration that comes with the package."""
    return read()
