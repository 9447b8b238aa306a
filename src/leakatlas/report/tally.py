"""How much one adversary recovered, beside what a guess recovers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leakatlas.metrics.intervals import binomial
from leakatlas.report.run import Run
from leakatlas.report.words import RECOGNISABLE_PSNR, recognisable
from leakatlas.threat import LETTERS


@dataclass(frozen=True)
class Tally:
    """Images over all set-ups, each with the attack that did best on it.

    Args:
        images: Attacked images n.
        recovered: Images k that came out recognisable or better.
        exact: Of them, exactly.
        low: Lower end of the 95 % Wilson interval of k / n.
        high: Its upper end.
        guessed: Images on which a guess without this update (the best null baseline) reaches the
            same bar.
        worst: PSNR of the image that came out best, in dB.
        average: Mean PSNR over all images, in dB.
        average_guess: Mean PSNR of the best null baseline, in dB.
    """

    images: int
    recovered: int
    exact: int
    low: float
    high: float
    guessed: int
    worst: float
    average: float
    average_guess: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dict(vars(self))

    def in_words(self) -> str:
        """Share, interval and guess."""
        share = 100 * self.recovered / self.images
        return (
            f"recovered {self.recovered} of {self.images} images recognisably ({share:.0f} %, 95 % "
            f"interval {100 * self.low:.0f} to {100 * self.high:.0f} %); a guess without the "
            f"update recovers {self.guessed} of {self.images}"
        )


def tally(runs: Iterable[tuple[str, Run]], letter: str) -> Tally | None:
    """What a letter's knowledge recovered; None if nothing was scored.

    Args:
        runs: Each with the name under which its images are counted once.
        letter: Threat model.
    """
    held = LETTERS[letter].knowledge
    best: dict[tuple[str, int, int], tuple[float, bool, bool, float]] = {}
    for name, run in runs:
        if run.scores is None or LETTERS[run.letter].knowledge & ~held:
            continue
        for place, (image, seen) in enumerate(
            zip(run.scores.images, recognisable(run.scores), strict=True)
        ):
            key = (name, run.target, place)
            old = best.get(key, (image.psnr, False, False, image.null_psnr))
            best[key] = (
                max(old[0], image.psnr),
                old[1] or seen,
                old[2] or image.exact,
                max(old[3], image.null_psnr),
            )
    if not best:
        return None
    images = list(best.values())
    n, k = len(images), sum(image[1] for image in images)
    low, high = binomial(k, n)
    return Tally(
        images=n,
        recovered=k,
        exact=sum(image[2] for image in images),
        low=low,
        high=high,
        guessed=sum(image[3] >= RECOGNISABLE_PSNR for image in images),
        worst=max(image[0] for image in images),
        average=sum(image[0] for image in images) / n,
        average_guess=sum(image[3] for image in images) / n,
    )
