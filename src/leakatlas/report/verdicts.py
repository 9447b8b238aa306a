"""The words for what came out of an update."""

from __future__ import annotations

from leakatlas.metrics.score import Scores

VERDICTS = ("not demonstrated", "label leak only", "recognisable", "exact leak")
"""From weakest to strongest."""

RECOGNISABLE_PSNR = 20.0
"""PSNR in dB from which a candidate that beats every null baseline counts as recognisable."""


def verdict(scores: Scores) -> str:
    """The strongest honest word for a result.

    ``exact leak``: at least one original equals a candidate within rounding. ``recognisable``: at
    least one is above 20 dB *and* the mean beats the best null baseline. ``label leak only``: the
    labels are right beyond the empty prediction. Otherwise ``not demonstrated``, which never
    means safe.
    """
    if scores.success["exact"].successes:
        return VERDICTS[3]
    best = max(image.psnr for image in scores.images if image.candidate is not None) if any(
        image.candidate is not None for image in scores.images
    ) else float("-inf")  # fmt: skip
    if best >= RECOGNISABLE_PSNR and best > scores.baselines[scores.best_baseline].psnr:
        return VERDICTS[2]
    if scores.labels is not None and scores.labels.exact_batch:
        return VERDICTS[1]
    return VERDICTS[0]
