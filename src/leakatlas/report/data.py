"""The result of an audit: plain data that becomes ``report.json`` and the HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakatlas.blocks.watch import MORE_TIME
from leakatlas.errors import Undecided
from leakatlas.report.context import Context
from leakatlas.report.gate import parse_gate
from leakatlas.report.realism import Realism, Standing, sides, standings, strongest
from leakatlas.report.run import Run
from leakatlas.report.tally import Tally, tally
from leakatlas.report.words import Verdict
from leakatlas.threat import LETTERS

SCHEMA = "leakatlas/report/3"

AMPLE = 3.0
"""A budget of so many times what start-up and examination took leaves time for attacks."""


@dataclass(frozen=True)
class Comparison:
    """One set of defenses on the first setting: what still leaked, and what it cost.

    Args:
        name: For people.
        defenses: As JSON, keys and parameters.
        runs: The battery under these defenses.
        accuracy: On the task; None if it could not be trained.
        reason: Why not.
        task: Whose accuracy is meant, in words.
    """

    name: str
    defenses: tuple[Mapping[str, Any], ...]
    runs: tuple[Run, ...]
    accuracy: float | None
    reason: str = ""
    task: str = "a reference task"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "defenses": [dict(d) for d in self.defenses],
            "runs": [run.to_json() for run in self.runs],
            "accuracy": self.accuracy,
            "reason": self.reason,
            "task": self.task,
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
        realism: One record a setting, with the runs that make the other of the two verdicts.
        context: What the audit is about, as whoever answers for it said.
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
    realism: tuple[Realism, ...] = ()
    context: Context = field(default_factory=Context)

    def verdicts(self) -> tuple[LetterVerdict, ...]:
        """One verdict for each letter, from the runs whose knowledge it holds.

        A run made under a weaker letter counts for every letter that knows at least as much.
        """
        return tuple(self._verdict(letter) for letter in self.letters)

    def _verdict(self, letter: str) -> LetterVerdict:
        best = strongest(self.runs, letter)
        if best is None:
            return LetterVerdict(letter, "not tested", None)
        index = next(i for i, run in enumerate(self.runs) if run is best)
        return LetterVerdict(letter, best.verdict, index)

    def standings(self) -> tuple[Standing, ...]:
        """As deployed, and the diagnostic upper bound: both verdicts for each letter.

        Conditions and exit codes rest on :meth:`verdicts`, what was configured.
        """
        return standings(self.runs, self.realism, self.letters)

    def recovered(self) -> dict[str, tuple[Tally | None, Tally | None]]:
        """For each letter how much came out as deployed and as an upper bound, beside a guess."""
        deployed, bound = sides(self.runs, self.realism)
        return {
            letter: (tally(deployed, letter), tally([*deployed, *bound], letter))
            for letter in self.letters
        }

    def undecided(self) -> tuple[str, ...]:
        """Why silence of this audit is no answer; empty if all that was asked was tried.

        An audit is undecided if it was stopped, if nothing was tried for one of its letters, if an
        attack crashed or lacked something that the user could give. So it is if a run was cut
        short or lacked time, unless an adversary that knows no more rebuilt every image exactly.
        """
        reasons = []
        if not self.complete:
            reasons.append("the audit was stopped before its end")
        untested = [found.letter for found in self.verdicts() if found.run is None]
        if untested:
            plural = "s" if len(untested) > 1 else ""
            named = f"letter{plural} {', '.join(untested)}"
            reasons.append(f"nothing was tried for {named}{self._enough(untested)}")
        if any(run.verdict == "not scored" for run in self.runs):
            reasons.append("reconstructions of a capture without its images cannot be scored")
        asked = (*self.runs, *(run for c in self.comparisons for run in c.runs))
        every = (*asked, *(run for found in self.realism for run in found.runs))
        for lost in dict.fromkeys((*(run.unkept for run in every), self.unwritten)):
            if lost:
                reasons.append(f"{lost}; make room and repeat the command")
        crashed: dict[str, list[str]] = {}
        refused: dict[str, list[Run]] = {}
        for run in every:
            if run.status == "error":
                said = f"{run.attack} crashed ({run.reason})"
                crashed.setdefault(said, []).append(run.setting)
        for run in asked:
            late = MORE_TIME in run.wants
            if run.status == "refused" and run.wants and not (late and self._superseded(run)):
                refused.setdefault(run.wants, []).append(run)
        for said, settings in crashed.items():
            reasons.append(f"{said} on {'; '.join(dict.fromkeys(settings))}")
        cut = [run for run in asked if run.status == "cut short" and not self._superseded(run)]
        if cut:
            reasons.append(
                f"cut short: {_by_setting(cut)} (what they show is the least that comes out; give "
                "them more time, as with --budget)"
            )
        for wants, runs in refused.items():
            reasons.append(f"refused: {_by_setting(runs)} ({wants.rstrip('.')})")
        return tuple(reasons)

    def _enough(self, letters: Sequence[str]) -> str:
        """Which budget would try something for these letters, as far as that is known."""
        known, budget = self.facts.get("enough", {}), self.facts.get("budget_seconds")
        if all(letter in known for letter in letters):
            most = max((known[letter] for letter in letters), key=lambda one: float(one["seconds"]))
            minutes = math.ceil(float(most["seconds"]) / 30) / 2
            return f" (a budget of about {minutes:g} min would try {most['attack']})"
        examined = self.facts.get("examined_seconds", 0.0)
        if budget is not None and examined > budget / 2:
            ample = math.ceil(AMPLE * examined / 30) / 2
            return (
                f" (of {budget:.0f} s, start-up and examination alone took {examined:.0f}; a "
                f"budget of about {ample:g} min leaves time for attacks)"
            )
        return ""

    def _superseded(self, cut: Run) -> bool:
        """Whether trying more could show nothing that a run's adversary does not have already.

        Some run on the same client, by an adversary that knows no more, rebuilt every image
        exactly.
        """
        if not cut.letter:
            return False
        held = LETTERS[cut.letter].knowledge
        return any(
            run.setting == cut.setting
            and run.target == cut.target
            and run.defenses == cut.defenses
            and run.scores is not None
            and all(image.exact for image in run.scores.images)
            and not LETTERS[run.letter].knowledge & ~held
            for run in self.runs
        )

    def spared(self) -> tuple[str, ...]:
        """Set-ups in which some clients were attacked and others were not, in words.

        Their images are in no share and no gate: those say what was found out about the others.
        """
        return tuple(
            f"{s['name']}: {s['attacked']} of {s['clients']} clients were attacked, and all "
            "figures are theirs"
            for s in self.facts.get("settings", ())
            if s.get("attacked", s["clients"]) < s["clients"]
        )

    def worst_case(self) -> dict[str, list[float]]:
        """Per metric, one value for each original image: the worst over all runs."""
        return worst_case(self.runs)

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
            "verdicts": [
                {
                    **vars(v),
                    **s.to_json(),
                    "recovered": [
                        found and found.to_json() for found in self.recovered()[v.letter]
                    ],
                }
                for v, s in zip(self.verdicts(), self.standings(), strict=True)
            ],
            "context": self.context.to_json(),
            "undecided": list(self.undecided()),
            "worst_case": self.worst_case(),
            "runs": [run.to_json() for run in self.runs],
            "realism": [found.to_json() for found in self.realism],
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


def worst_case(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Per metric, one value for each original image that was attacked: the worst over the runs."""
    best: dict[tuple[str, int, int], dict[str, float]] = {}
    for run in runs:
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
            best[key] = {m: (min if m == "mse" else max)(old[m], value) for m, value in now.items()}
    return {m: [values[m] for values in best.values()] for m in ("psnr", "ssim", "mse", "exact")}


def _by_setting(runs: Iterable[Run]) -> str:
    """The attacks of runs, set-up by set-up."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        found.setdefault(run.setting, {})[run.attack] = None
    return "; ".join(f"{', '.join(attacks)} on {setting}" for setting, attacks in found.items())
