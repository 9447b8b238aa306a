"""How a rehearsal divides its time: successive halving among the variants of an attack."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST = 20
"""Iterations below which a trial says nothing."""

LENGTHS = (1 / 4, 1.0)
"""Lengths of the trials of each stage, in units of the planned length. Short trials favour fast
variants and strong priors, so the last ones are as long as the run that they stand for."""

FIELD = (3,)
"""Variants that reach the second stage."""


@dataclass(frozen=True)
class Stage:
    """One round of successive halving.

    Args:
        variants: How many take part.
        iterations: Length of each trial.
        images: Batches for each trial.
    """

    variants: int
    iterations: int
    images: int

    @property
    def cost(self) -> int:
        """Iterations of all its trials."""
        return self.variants * self.iterations * self.images


def stages(
    variants: int, planned: int, images: int, affordable: float = math.inf
) -> tuple[Stage, ...]:
    """The rounds of a rehearsal that costs no more than it may.

    First the number of batches gives way, then the number of variants: trials much shorter than
    the run that they stand for mislead, so a few variants are tried at the planned length rather
    than all of them briefly. Where not even two are affordable so, two are compared in what time
    there is.

    Args:
        variants: V, in order of promise.
        planned: Iterations of the victim's run.
        images: Batches of public images, at most.
        affordable: Iterations that all trials may take together.

    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2)]
    [(8, 100, 2), (3, 400, 2)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=2_000)]
    [(8, 100, 1), (3, 400, 1)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=1_700)]
    [(4, 400, 1)]
    >>> [(s.variants, s.iterations, s.images) for s in stages(8, 400, 2, affordable=500)]
    [(2, 250, 1)]
    """

    def rounds(images: int) -> tuple[Stage, ...]:
        field = [min(variants, n) for n in (variants, *FIELD)]
        lengths = [min(planned, max(LEAST, int(part * planned))) for part in LENGTHS]
        made = [Stage(n, length, images) for n, length in zip(field, lengths, strict=True)]
        return tuple(made) if variants > FIELD[0] else tuple(made[-1:])

    for fewer in range(images, 0, -1):
        if sum(stage.cost for stage in rounds(fewer)) <= affordable:
            return rounds(fewer)
    several = min(variants, max(2, int(affordable / planned)))
    length = min(planned, max(LEAST, int(affordable / several)))
    return (Stage(several, length, 1),)
