"""One attack on one setting: what became of it, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leakatlas.metrics.score import Scores
from leakatlas.params import checked
from leakatlas.report.words import TRIED, Status, Verdict, rank


@dataclass(frozen=True)
class Run:
    """One attack on one setting, or the reason why it was not run.

    Args:
        setting: Name of the setting.
        attack: Catalogue key.
        letter: Weakest chosen threat model under which it could run; empty if none.
        vantage: Where the adversary looked.
        target: Client attacked.
        defenses: Keys of the defenses in force.
        status: What became of it.
        reason: Why, where it is not ``complete``; of a complete run, what its control on another
            batch says against it.
        verdict: What came out; ``not tested`` unless it was tried.
        wants: What the user could do so that a refused attack starts; empty where the chosen
            letters leave it out.
        trace: Where an attack crashed.
        unkept: Why the run could not be written to the output folder; empty if it was.
        seconds: Wall time of the attack.
        rounds: Rounds that the adversary saw.
        reads: View fields read.
        scores: Against the truth; None unless it was tried and the truth is at hand.
        confidence: The adversary's own, one for each candidate, by its own criterion.
        recipe: What to run again.
        notes: Figures that the attack reported.
        execution: How slopes were computed, in words.
        pictures: Original and candidate beside each other, in [0, 1]: ``(n, 2, C, H, W)``; without
            a truth the candidates alone, ``(n, 1, C, H, W)``.
    """

    setting: str
    attack: str
    letter: str
    vantage: str
    target: int
    defenses: tuple[str, ...]
    status: Status
    reason: str
    verdict: Verdict
    wants: str = ""
    trace: str = ""
    unkept: str = ""
    seconds: float = 0.0
    rounds: int = 0
    reads: tuple[str, ...] = ()
    scores: Scores | None = None
    confidence: tuple[float, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    execution: str = ""
    pictures: Tensor | None = None

    @property
    def tried(self) -> bool:
        """Whether the attack ran, so that its outcome counts."""
        return self.status in TRIED

    @property
    def leaked(self) -> bool:
        """Whether anything beyond the null baselines was demonstrated."""
        return rank(self.verdict) > rank("not demonstrated")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without the pictures."""
        plain = {k: v for k, v in vars(self).items() if k not in ("scores", "pictures")}
        plain["defenses"], plain["reads"] = list(self.defenses), list(self.reads)
        plain["confidence"] = list(self.confidence)
        plain["recipe"], plain["notes"] = dict(self.recipe), dict(self.notes)
        plain["scores"] = None if self.scores is None else self.scores.to_json()
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any], pictures: Tensor | None = None) -> Run:
        """The run whose :meth:`to_json` is ``values``.

        Raises:
            ValueError: If a value is not of its type (or another of :data:`.sealed.MALFORMED`).
        """
        plain = dict(values)
        scores = plain.pop("scores")
        return cls(
            **checked(cls, plain),
            scores=None if scores is None else Scores.from_json(scores),
            pictures=pictures,
        )


def pictures_of(scores: Scores, candidates: Tensor, originals: Tensor, most: int = 16) -> Tensor:
    """Originals beside candidates, ``(n, 2, C, H, W)`` in [0, 1]; grey where there is none."""
    pairs = []
    for original, image in list(zip(originals, scores.images, strict=True))[:most]:
        found = (
            torch.full_like(original, 0.5)
            if image.candidate is None
            else candidates[image.candidate].to(original).clamp(0, 1)
        )
        pairs.append(torch.stack([original, found]))
    return torch.stack(pairs)
