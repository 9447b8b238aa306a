r"""OASIS: every image trains together with transformed copies of itself.

Jeter, Nguyen, Alharbi and Thai, "OASIS: Offsetting Active Reconstruction Attacks in Federated
Learning", ICDCS 2024.

.. math:: D' = \bigcup_i \{x_i\} \cup X'_i, \qquad X'_i = \{T_1 x_i, \ldots, T_c x_i\}, \qquad
          y(T_k x_i) = y_i,

and the mean loss is taken over D'. An active attack reads an image off a unit that it alone
excites. If whatever excites a unit comes with a copy that excites it, too, the unit's gradient is
a linear combination of the copies, and no row holds the image itself. Quarter turns keep every sum
over pixels, hence the brightness by which imprint layers sort: original and copies share a bin.

What an adversary does about it: the transforms are public, so :meth:`OASIS.simulate_batch` puts
the copies into its replay, where the true images are an exact zero. And a measurement that turns
do not keep (random weights instead of the brightness) tells the copies apart again, each of them
the image up to a turn.

Measured (study ``oasis``): imprints that sort by brightness, LOKI's among them, give next to
nothing; rows of random direction still give many of the images, up to a turn; Scale-MIA gets little
either way. Accuracy pays for it.

Departures:
    - Rebuilt from the abstract: which angles and which shears the paper takes was not read. Here
      they are the three quarter turns, three shears and both flips.
    - A shear moves whole pixels and fills with 0 in model space, the mean colour.
    - Giving copies to a part of the images only is ours: it makes the defense gradual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.fl import ActsOn, ClientContext, Defense
from leakatlas.params import Fraction

Transform = Callable[[Tensor], Tensor]
Copies = Literal["rotation", "shear", "flip", "rotation and shear"]


@dataclass(frozen=True, kw_only=True)
class OASIS(Defense):
    """Appends transformed copies for a fraction of every local batch.

    Args:
        fraction: Share of the batch whose copies are appended (all of it in the paper).
        copies: Which: three quarter turns, three shears, both flips, or turns and shears.
    """

    key: ClassVar[str] = "oasis"
    knob: ClassVar[str] = "fraction"
    neutral: ClassVar[float] = 0.0
    strengths: ClassVar[tuple[float, ...]] = (1.0,)
    stage: ClassVar[int] = 10
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    fraction: Fraction = 1.0
    copies: Copies = "rotation"

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """The batch with its copies behind it."""
        del context
        return self.simulate_batch(x, y)

    def simulate_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same rule on candidates: it has no secret.

        Raises:
            InvalidInput: If images that are not square are to be turned.
        """
        count = math.ceil(self.fraction * len(x))
        if count == 0:
            return x, y
        if "rotation" in self.copies and x.shape[-1] != x.shape[-2]:
            raise InvalidInput(
                f"OASIS(copies={self.copies!r}) turns images by quarters, and these are "
                f"{x.shape[-2]}x{x.shape[-1]}; take copies='shear' or 'flip'."
            )
        transforms = TRANSFORMS[self.copies]
        copies = [transform(x[:count]) for transform in transforms]
        return torch.cat([x, *copies]), torch.cat([y, *([y[:count]] * len(transforms))])


def turned(quarters: int) -> Transform:
    """``(N, C, S, S)`` turned counterclockwise by so many quarters."""
    return lambda x: x.rot90(quarters, (-2, -1))


def flipped(dim: int) -> Transform:
    """``(N, C, H, W)`` mirrored along one of its sides."""
    return lambda x: x.flip(dim)


def sheared(factor: float) -> Transform:
    """``(N, C, H, W)`` whose rows move aside by ``factor`` times their distance from the middle.

    Pixels move as a whole and fall off the edge; what they leave is 0.
    """

    def shear(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = torch.arange(height, device=x.device) - (height - 1) / 2
        source = torch.arange(width, device=x.device) - (factor * rows).round().long()[:, None]
        inside = (source >= 0) & (source < width)
        index = source.clamp(0, width - 1).expand(x.shape)
        return torch.where(inside, x.gather(-1, index), torch.zeros_like(x))

    return shear


TURNS = (turned(1), turned(2), turned(3))
SHEARS = (sheared(-0.5), sheared(0.5), sheared(1.0))
TRANSFORMS: Mapping[Copies, tuple[Transform, ...]] = {
    "rotation": TURNS,
    "shear": SHEARS,
    "flip": (flipped(-1), flipped(-2)),
    "rotation and shear": (*TURNS, *SHEARS),
}
