"""The closed list of what a study reports, and how each is read from a record.

A measure of ``kind`` "image" gives one number an original, "image share" one yes or no an original,
"cell" one number a cell and "cell share" one yes or no a cell. Per-image values of several seeds on
one image are averaged first: images vary, seeds of one image are no new images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["image", "image share", "cell", "cell share"]


@dataclass(frozen=True)
class Measure:
    """One measure.

    Args:
        kind: What one value belongs to.
        unit: Unit, empty for a ratio.
        read: From the scores of a record (as JSON) to its values.
    """

    kind: Kind
    unit: str
    read: Callable[[Mapping[str, Any]], Sequence[float]]


def _of_images(name: str) -> Callable[[Mapping[str, Any]], list[float]]:
    return lambda scores: [float(image[name]) for image in scores["images"]]


def _log_mse(scores: Mapping[str, Any]) -> list[float]:
    # An exact copy has no logarithm; 1e-30 is below the square of any float64 rounding.
    return [math.log10(max(float(image["mse"]), 1e-30)) for image in scores["images"]]


def _reaches(threshold: float) -> Callable[[Mapping[str, Any]], list[float]]:
    return lambda scores: [
        float(image["candidate"] is not None and image["psnr"] >= threshold)
        for image in scores["images"]
    ]


def _ssim_above(scores: Mapping[str, Any]) -> list[float]:
    """Whether SSIM exceeds one half; nothing below a side of 11 pixels, where it is undefined."""
    return [
        float(image["candidate"] is not None and image["ssim"] > 0.5)
        for image in scores["images"]
        if image["ssim"] is not None
    ]


def _mse_below(threshold: float) -> Callable[[Mapping[str, Any]], list[float]]:
    return lambda scores: [
        float(image["candidate"] is not None and image["mse"] < threshold)
        for image in scores["images"]
    ]


def _labels(name: str) -> Callable[[Mapping[str, Any]], list[float]]:
    """A label measure; an attack that names no label has found none of them."""
    return lambda scores: [0.0 if scores["labels"] is None else float(scores["labels"][name])]


MEASURES: dict[str, Measure] = {
    "psnr": Measure("image", "dB", _of_images("psnr")),
    "ssim": Measure("image", "", _of_images("ssim")),
    "mse": Measure("image", "", _of_images("mse")),
    "log10_mse": Measure("image", "", _log_mse),
    "best_psnr": Measure("cell", "dB", lambda s: [max(_of_images("psnr")(s))]),
    "gain": Measure("cell", "dB", lambda s: [float(s["gain"])]),
    "exact": Measure("image share", "", _of_images("exact")),
    "pixel_exact": Measure("image share", "", _of_images("pixel_exact")),
    "any_exact": Measure("cell share", "", lambda s: [max(_of_images("exact")(s))]),
    "exact_images": Measure("cell", "images", lambda s: [sum(_of_images("exact")(s))]),
    **{
        f"mse_below_{limit}": Measure("image share", "", _mse_below(float(limit)))
        for limit in ("1e-4", "1e-6", "1e-10", "1e-12")
    },
    **{
        f"psnr_above_{tau}": Measure("image share", "", _reaches(tau))
        for tau in (15, 18, 19, 20, 25, 30)
    },
    "ssim_above_0.5": Measure("image share", "", _ssim_above),
    "success_rate": Measure("image share", "", _reaches(19.0)),
    "all_labels": Measure("cell share", "", _labels("exact_batch")),
    "label_overlap": Measure("cell", "", _labels("irec")),
    "candidates": Measure("cell", "images", lambda s: [float(s["candidates"])]),
    "surplus": Measure("cell", "images", lambda s: [float(s["surplus"])]),
    "missing": Measure("cell", "images", lambda s: [float(s["missing"])]),
}
"""Read from the scores."""

BINS = {
    "alone": (True, "originals with a bin to themselves, by the true measurements"),
    "exact_of_alone": (True, "of those, what came back exactly"),
    "expected_alone": (False, "share alone of independent measurements"),
}
"""Of attacks that sort examples into bins: whether it is a share, and what it says.

Computed where the truth is (:func:`leakatlas.bench.examine.bins`).
"""

COSTS = {"seconds": "s", "cpu_seconds": "s", "rounds": "rounds", "peak_memory": "MiB"}
"""Read from what a cell cost; no part of what is equal from run to run."""

NOTES = "notes."
"""Prefix of a figure that the attack noted itself."""


def known(name: str) -> bool:
    """Whether a study may ask for this measure."""
    noted = name.startswith(NOTES) and len(name) > len(NOTES)
    return noted or name in {**MEASURES, **BINS, **COSTS}
