"""Making published PSNRs comparable with ours.

Only scale can be undone afterwards. Conditional means (over successes only), best-of matching and
unclamped scoring cannot: such numbers are shown as printed, with their convention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from leakatlas.errors import InvalidInput


def psnr_from_range(value: float, *, low: float, high: float, peak: float = 1.0) -> float:
    """Canonical PSNR of a value computed in pixel range [low, high] with a given peak.

    ``[-1, 1]`` with peak 1 gains ``20 log10 2 = 6.02`` dB; ``[0, 255]`` with peak 255 gains none.
    """
    if not high > low or not peak > 0:
        raise InvalidInput(
            f"psnr_from_range: needs high > low and a positive peak, got {low}, {high}, {peak}."
        )
    return value + 20 * math.log10((high - low) / peak)


def psnr_from_normalised(value: float, std: Sequence[float], *, peak: float = 1.0) -> float:
    """Canonical PSNR of a value computed on network-normalised images with a given peak.

    Pixel errors are the normalised ones times the standard deviation, so peak 1 hides
    ``-20 log10 std`` dB: 12 to 14 for the usual data sets. Exact for equal channels; otherwise the
    root mean square of ``std`` assumes equal normalised errors in all channels.
    """
    if not std or not all(s > 0 for s in std) or not peak > 0:
        raise InvalidInput(
            f"psnr_from_normalised: needs positive standard deviations and peak, got {list(std)} "
            f"and {peak}."
        )
    mean_square = sum(s * s for s in std) / len(std)
    return value - 10 * math.log10(mean_square) - 20 * math.log10(peak)
