"""The result of an audit: plain data that becomes ``report.json`` and the HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas import limits, reading
from leakatlas.errors import InvalidInput, Undecided
from leakatlas.metrics.score import Scores
from leakatlas.report.gate import parse_gate
from leakatlas.report.words import TRIED, Status, Verdict, rank
from leakatlas.threat import LETTERS

SCHEMA = "leakatlas/report/2"


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
        reason: Why, where it is not ``complete``.
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
        """The run whose :meth:`to_json` is ``values``."""
        plain = dict(values)
        scores = plain.pop("scores")
        plain["defenses"], plain["reads"] = tuple(plain["defenses"]), tuple(plain["reads"])
        plain["confidence"] = tuple(plain["confidence"])
        return cls(
            **plain,
            scores=None if scores is None else Scores.from_json(scores),
            pictures=pictures,
        )


@dataclass(frozen=True)
class Comparison:
    """One set of defenses on the first setting: what still leaked, and what it cost.

    Args:
        name: For people.
        defenses: As JSON, keys and parameters.
        runs: The battery under these defenses.
        accuracy: On the reference task; None if it could not be trained.
        reason: Why not.
    """

    name: str
    defenses: tuple[Mapping[str, Any], ...]
    runs: tuple[Run, ...]
    accuracy: float | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "defenses": [dict(d) for d in self.defenses],
            "runs": [run.to_json() for run in self.runs],
            "accuracy": self.accuracy,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class LetterVerdict:
    """What one adversary achieved.

    Args:
        letter: Threat model.
        verdict: The strongest over all runs that this adversary could make; ``not tested`` if
            there was none.
        run: Index of the strongest run, or None.
    """

    letter: str
    verdict: Verdict
    run: int | None


@dataclass(frozen=True)
class Report:
    """Everything that an audit found.

    Args:
        runs: Under the settings' own defenses.
        comparisons: Alternatives, the undefended case first.
        letters: Threat models asked for.
        diagnoses: The doctor's findings by setting, as JSON.
        facts: Models, data, hardware, versions, budget.
        command: Repeats the audit.
        source: The configuration.
        complete: Whether the audit went on to its end, not stopped before.
        unwritten: Why the report could not be written to the output folder; empty if it was.
        seconds: Wall time of this audit, resumed parts not counted twice.
    """

    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    letters: tuple[str, ...]
    diagnoses: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    command: str
    source: Mapping[str, Any]
    complete: bool
    seconds: float
    unwritten: str = ""

    def verdicts(self) -> tuple[LetterVerdict, ...]:
        """One verdict for each letter, from the runs whose knowledge it holds.

        A run made under a weaker letter counts for every letter that knows at least as much.
        """
        return tuple(self._verdict(letter) for letter in self.letters)

    def _verdict(self, letter: str) -> LetterVerdict:
        held = LETTERS[letter].knowledge
        best: tuple[tuple[int, float], int] | None = None
        for index, run in enumerate(self.runs):
            if run.scores is None or LETTERS[run.letter].knowledge & ~held:
                continue
            strength = (rank(run.verdict), run.scores.psnr.max)
            if best is None or strength > best[0]:
                best = (strength, index)
        if best is None:
            for index, run in enumerate(self.runs):
                if run.verdict == "not scored" and not LETTERS[run.letter].knowledge & ~held:
                    return LetterVerdict(letter, "not scored", index)
            return LetterVerdict(letter, "not tested", None)
        return LetterVerdict(letter, self.runs[best[1]].verdict, best[1])

    def undecided(self) -> tuple[str, ...]:
        """Why silence of this audit is no answer; empty if all that was asked was tried.

        An audit is undecided if it was stopped, if nothing was tried for one of its letters, or
        if an attack crashed or lacked something that the user could give.
        """
        reasons = []
        if not self.complete:
            reasons.append("the audit was stopped before its end")
        untested = [found.letter for found in self.verdicts() if found.run is None]
        if untested:
            plural = "s" if len(untested) > 1 else ""
            reasons.append(f"nothing was tried for letter{plural} {', '.join(untested)}")
        if any(run.verdict == "not scored" for run in self.runs):
            reasons.append("reconstructions of a capture without its images cannot be scored")
        every = (*self.runs, *(run for c in self.comparisons for run in c.runs))
        for lost in dict.fromkeys((*(run.unkept for run in every), self.unwritten)):
            if lost:
                reasons.append(f"{lost}; make room and repeat the command")
        crashed: dict[str, list[str]] = {}
        refused: dict[str, list[str]] = {}
        for run in every:
            if run.status == "error":
                said = f"{run.attack} crashed ({run.reason})"
                crashed.setdefault(said, []).append(run.setting)
            elif run.status == "refused" and run.wants:
                refused.setdefault(run.wants, []).append(f"{run.attack} on {run.setting}")
        for said, settings in crashed.items():
            reasons.append(f"{said} on {'; '.join(dict.fromkeys(settings))}")
        for wants, runs in refused.items():
            reasons.append(f"refused: {'; '.join(dict.fromkeys(runs))} ({wants.rstrip('.')})")
        return tuple(reasons)

    def worst_case(self) -> dict[str, list[float]]:
        """Per metric, one value for each original image: the worst over all runs."""
        best: dict[tuple[str, int, int], dict[str, float]] = {}
        for run in self.runs:
            if run.scores is None:
                continue
            for position, image in enumerate(run.scores.images):
                key = (run.setting, run.target, position)
                now = {
                    "psnr": image.psnr,
                    "ssim": image.ssim if image.ssim is not None else 0.0,
                    "mse": image.mse,
                    "exact": float(image.exact),
                }
                old = best.setdefault(key, now)
                best[key] = {
                    m: (min if m == "mse" else max)(old[m], value) for m, value in now.items()
                }
        return {
            m: [values[m] for values in best.values()] for m in ("psnr", "ssim", "mse", "exact")
        }

    def exceeds(self, condition: str, *, allow_undecided: bool = False) -> bool:
        """Whether a condition such as ``P(psnr > 20 dB) > 0.05`` holds; see :func:`parse_gate`.

        Args:
            condition: In the language of :func:`~leakatlas.report.gate.parse_gate`.
            allow_undecided: Answer from what ran, although not all that was asked was tried.

        Raises:
            InvalidParameter: If the condition cannot be read.
            Undecided: If it does not hold on what ran, and that was not all.
        """
        if parse_gate(condition).holds(self.worst_case()):
            return True
        reasons = self.undecided()
        if reasons and not allow_undecided:
            raise Undecided(
                f"{condition!r} does not hold on what ran, but {'; '.join(reasons)}. Give what is "
                "missing, choose fewer letters or attacks, or pass allow_undecided=True."
            )
        return False

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {
            "schema": SCHEMA,
            "letters": list(self.letters),
            "verdicts": [vars(v).copy() for v in self.verdicts()],
            "undecided": list(self.undecided()),
            "worst_case": self.worst_case(),
            "runs": [run.to_json() for run in self.runs],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "diagnoses": {name: dict(d) for name, d in self.diagnoses.items()},
            "facts": dict(self.facts),
            "command": self.command,
            "source": dict(self.source),
            "complete": self.complete,
            "seconds": self.seconds,
            "unwritten": self.unwritten,
        }

    def save(self, folder: Path | str) -> Path:
        """Write ``report.html``, ``report.json`` and its JSON Schema; returns the page's path."""
        from leakatlas.report.write import write_report

        return write_report(self, Path(folder))


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


def load_report(path: Path | str) -> Mapping[str, Any]:
    """The content of a ``report.json``.

    Raises:
        InvalidInput: If the file is missing or not a report.
    """
    path = Path(path)
    if reading.is_folder(path):
        path = path / "report.json"
    values = reading.read_json(path, what="report", limit=limits.REPORT)
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise InvalidInput(f"{str(path)!r} is not a report of schema {SCHEMA!r}.")
    return values
