"""The words for what became of a run, and for what came out of an update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from leakatlas.metrics.score import Scores

Status = Literal["complete", "cut short", "failed", "error", "refused", "not applicable"]
"""What became of a run: it ran to its end; the clock or the user ended it; the attack itself says
that it did not work; it crashed; the view lacks what it needs; theory rules it out. Only the first
three were tried."""

TRIED: tuple[Status, ...] = ("complete", "cut short", "failed")
"""Statuses of runs whose outcome counts."""

Verdict = Literal[
    "not tested", "not scored", "not demonstrated", "label leak only", "recognisable", "exact leak"
]

VERDICTS: tuple[Verdict, ...] = (
    "not tested",
    "not scored",
    "not demonstrated",
    "label leak only",
    "recognisable",
    "exact leak",
)
"""From weakest to strongest. ``not tested`` (nothing was tried), ``not scored`` (tried, and no
truth is at hand to hold the result against) and ``not demonstrated`` (tried, nothing came out)
never stand for one another, and none of them means safe."""

TONE: Mapping[str, str] = {
    "exact leak": "exact",
    "recognisable": "seen",
    "label leak only": "label",
    "not demonstrated": "none",
    "not tested": "untested",
    "not scored": "untested",
}
"""Style class of each verdict; none of them is green, because nothing here proves safety."""

RECOGNISABLE_PSNR = 20.0
"""PSNR in dB from which a candidate that beats every null baseline counts as recognisable."""


def verdict(scores: Scores) -> Verdict:
    """The strongest honest word for a result.

    ``exact leak``: at least one original equals a candidate within rounding. ``recognisable``: at
    least one candidate reaches :data:`RECOGNISABLE_PSNR` and beats every null baseline on its own
    original, *and* the mean over all originals beats the best null baseline's. ``label leak
    only``: every label of the batch was recovered, without being granted. Otherwise ``not
    demonstrated``.
    """
    if scores.success["exact"].successes:
        return "exact leak"
    if any(recognisable(scores)):
        return "recognisable"
    if scores.labels is not None and scores.labels.exact_batch:
        return "label leak only"
    return "not demonstrated"


def recognisable(scores: Scores) -> tuple[bool, ...]:
    """For each original whether it counts as recognisable, or better."""
    return tuple(
        image.exact
        or (
            scores.gain > 0
            and image.candidate is not None
            and image.psnr >= RECOGNISABLE_PSNR
            and image.psnr > image.null_psnr
        )
        for image in scores.images
    )


def rank(word: Verdict) -> int:
    """Position in :data:`VERDICTS`: a stronger finding is larger."""
    return VERDICTS.index(word)


def beside(
    value: float, threshold: float, digits: int = 1, *, kind: Literal["f", "g"] = "f"
) -> str:
    """A figure with as many digits as it takes to stand where it is: above, at or below.

    19.96 beside a threshold of 20 is "19.96", never "20.0".

    Args:
        value: To be shown.
        threshold: What the word beside it was decided by.
        digits: At least so many: decimals (``f``) or significant ones (``g``).
        kind: Format.
    """
    for count in range(digits, 18):
        text = f"{value:.{count}{kind}}"
        shown = float(text)
        if (shown > threshold, shown < threshold) == (value > threshold, value < threshold):
            return text
    return repr(value)
