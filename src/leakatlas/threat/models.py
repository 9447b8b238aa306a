"""The eight threat models A-H (Carletti et al., 2025, threat model table)."""

from __future__ import annotations

from dataclasses import dataclass

from leakatlas.errors import UnknownName
from leakatlas.threat.knowledge import Knowledge


@dataclass(frozen=True)
class ThreatModel:
    """A named set of knowledge.

    Args:
        letter: A-H.
        name: The published name.
        knowledge: What this adversary holds.
    """

    letter: str
    name: str
    knowledge: Knowledge

    @property
    def active(self) -> bool:
        """Whether this adversary changes the protocol rather than only watching it."""
        return bool(self.knowledge & (Knowledge.MANIPULATION | Knowledge.SELECTION))


_B = Knowledge.UPDATES | Knowledge.BASIC
_C = _B | Knowledge.TRAINING
_D = _C | Knowledge.SURROGATE

LETTERS: dict[str, ThreatModel] = {
    model.letter: model
    for model in (
        ThreatModel("A", "Eavesdropper", Knowledge.UPDATES),
        ThreatModel("B", "Informed Eavesdropper", _B),
        ThreatModel("C", "Parameter-Aware Eavesdropper", _C),
        ThreatModel("D", "Data-Enhanced Eavesdropper", _D),
        ThreatModel("E", "Statistical-Informed Eavesdropper", _D | Knowledge.DISTRIBUTION),
        ThreatModel("F", "Active Manipulator", _C | Knowledge.MANIPULATION),
        ThreatModel("G", "Data-Enhanced Manipulator", _D | Knowledge.MANIPULATION),
        ThreatModel(
            "H", "Active Client Manipulator", _D | Knowledge.MANIPULATION | Knowledge.SELECTION
        ),
    )
}


def threat_model(letter: str) -> ThreatModel:
    """The threat model with this letter.

    Raises:
        UnknownName: If there is none.
    """
    try:
        return LETTERS[letter.strip().upper()]
    except KeyError:
        raise UnknownName("threat model", letter, LETTERS) from None


def threat_models(letters: str) -> tuple[ThreatModel, ...]:
    """Threat models from text such as ``"A-E"``, ``"B,F"`` or ``"A-C,G"``, in table order.

    Raises:
        UnknownName: If a letter is unknown or a range runs backwards.
    """
    chosen: set[str] = set()
    for part in letters.replace(" ", "").upper().split(","):
        first, dash, last = part.partition("-")
        start, end = threat_model(first).letter, threat_model(last if dash else first).letter
        span = [letter for letter in LETTERS if start <= letter <= end]
        if not span:
            raise UnknownName("threat model range", part, LETTERS)
        chosen.update(span)
    return tuple(LETTERS[letter] for letter in LETTERS if letter in chosen)
