r"""ATS, automatic transformation search: train on images whose gradients tell little of them.

Gao et al., "Privacy-Preserving Collaborative Learning with Automatic Transformation Search", CVPR
2021; "Automatic Transformation Search Against Deep Leakage From Gradients", IEEE TPAMI 2023.

Every training image is put through a policy of three operations out of a library of fifty, drawn at
random from a few policies that were searched for beforehand, on public data (:func:`searched`): a
policy is good where, on the way from noise to the transformed image, gradients become like its own
late (a small privacy score), and where a fresh network still tells transformed images apart (a
large accuracy score).

What an adversary does about it: it recovers the *transformed* image, with the quality that
undefended images have, and a translated or brightened image is still recognised. Early in training
even the lower quality is absent. So :meth:`ATS.simulate_batch` leaves candidates as they are: what
is compared with the original is what training used.

Departures:
    * Operations are those of torchvision on pixels in floating point; the release goes through 8
      bits. Its shears are bicubic, here bilinear.
    * The release's search reads ``policies`` by an index that can run past the end, and its tables
      do not run on today's NumPy; the library's order and magnitudes are kept.
    * The default is the hybrid that DCS-2 and the attack of Balunović et al. use for CIFAR-10.
    * Random crops and flips, which the release adds in the same mode, belong to the protocol.
    * ``operations`` below three take the first ones of a policy; that makes the defense gradual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakatlas.data import Box
from leakatlas.defenses.heuristic.learning.ats import _operations
from leakatlas.defenses.heuristic.learning.ats._search import searched as searched
from leakatlas.errors import InvalidInput
from leakatlas.fl import ActsOn, ClientContext, Defense, Memory

MOST = 3
"""Operations of a policy."""

Index = Annotated[int, Field(ge=0, lt=len(_operations.LIBRARY))]
Policy = Annotated[tuple[Index, ...], Field(min_length=MOST, max_length=MOST)]


@dataclass(frozen=True, kw_only=True)
class ATS(Defense):
    """Transforms every image by one of a few policies.

    Args:
        operations: How many operations of a policy are applied; 0 leaves images alone.
        policies: From which each image gets one at random, as indices into the library.
    """

    key: ClassVar[str] = "ats"
    knob: ClassVar[str] = "operations"
    neutral: ClassVar[int] = 0
    strengths: ClassVar[tuple[int, ...]] = (1, 2, 3)
    stage: ClassVar[int] = 10
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP})

    operations: Annotated[int, Field(ge=0, le=MOST)] = MOST
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)] = ((21, 13, 3), (7, 4, 15))

    def batch(self, x: Tensor, y: Tensor, context: ClientContext) -> tuple[Tensor, Tensor]:
        """The transformed batch; what was drawn is kept for one round.

        Raises:
            InvalidInput: If images have neither one channel nor three.
        """
        if self.operations == 0:
            return x, y
        chosen = torch.randint(len(self.policies), (len(x),), generator=context.generator)
        signs = torch.randint(2, (len(x), MOST), generator=context.generator) * 2 - 1
        if context.memory.get("round") != context.round:
            context.memory.update(round=context.round, chosen=[], signs=[])
        context.memory["chosen"].append(chosen)
        context.memory["signs"].append(signs)
        return self.transformed(x, chosen, signs, context.box), y

    def transformed(self, x: Tensor, chosen: Tensor, signs: Tensor, box: Box | None) -> Tensor:
        """Images under given policies; who is granted the secrets does the same.

        Args:
            x: ``(N, C, H, W)``, model space.
            chosen: ``(N,)`` which policy each gets.
            signs: ``(N, 3)`` of its operations.
            box: Between pixels and model space; the same if None.
        """
        if x.shape[1] not in (1, 3):
            raise InvalidInput(
                f"ATS transforms grey and colour images; these have {x.shape[1]} channels."
            )
        pixels = (x if box is None else box.denormalize(x)).clamp(0, 1)
        made = [
            _operations.transformed(
                image, self.policies[p][: self.operations], s[: self.operations]
            )
            for image, p, s in zip(pixels, chosen.tolist(), signs.tolist(), strict=True)
        ]
        found = torch.stack(made)
        return (found if box is None else box.normalize(found)).to(x)

    def secrets(self, memory: Memory) -> dict[str, Tensor]:
        """Policies and signs of the last round's images, in the order of its local steps."""
        if "chosen" not in memory:
            return {}
        return {"chosen": torch.cat(memory["chosen"]), "signs": torch.cat(memory["signs"])}
