"""``docs/lint.md`` and the thresholds of ``leakatlas lint``, from the results of their study.

Nothing else is read. Figures that the study has measured stand before those carried over from
before it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from leakatlas.catalogue import loader
from leakatlas.catalogue.results import Measure, Result
from leakatlas.lint import STATISTICS, holdings, thresholds
from leakatlas.metrics.intervals import binomial

PAGE, THRESHOLDS = "docs/lint.md", "src/leakatlas/lint/thresholds.json"
STUDY, CALIBRATION, HELD_OUT, FRESH = "lint", "calibration", "held out", "fresh"
HONEST = ("initialisations", "checkpoints")

# The matrix that the survey of these attacks predicts: decisive, supporting, nothing.
ROWS = (
    "robbing_the_fed", "fishing", "trap_weights", "sybils", "mandrake", "loki", "mkor", "seer",
    "scale_mia",
)  # fmt: skip
EXPECTED = {
    "D1": "●---●●---",
    "D2": "●---●●●-●",
    "D3": "●○--●●--●",
    "D4": "○●--●●●-●",
    "D5": "--●●-----",
    "D6": "○-○○●●●--",
    "D7": "-●----○-○",
    "D8": "○●○○○○--○",
    "D9": "○○●●●●○-○",
    "D10": "○○●●●●○-○",
    "D11": "○●○○○○○○○",
    "D12": "-○○●●●-○-",
    "D14": "●●●●●●●-●",
    "D15": "●---●●--●",
    "D16": "○○○○○○○○○",
    "D17": "●●●●●●●●●",
}


def generated(results: Iterable[Result]) -> dict[str, str]:
    """Path and text of what follows from the study; nothing, if it was not run."""
    found = Figures(tuple(result for result in results if result.key == STUDY))
    if not found.part(CALIBRATION):
        return {}
    calibration = found.calibration()
    return {
        PAGE: found.page(calibration),
        THRESHOLDS: json.dumps(calibration, indent=1, ensure_ascii=False) + "\n",
    }


@dataclass(frozen=True)
class Rate:
    """So many of so many, with its interval (95 %, Wilson)."""

    hits: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high."""
        low, high = binomial(self.hits, self.n)
        return low, high

    @property
    def share(self) -> float:
        """Hits of n."""
        return self.hits / self.n


@dataclass(frozen=True)
class Figures:
    """The figures of the study, each with the result that it is from."""

    results: tuple[Result, ...]

    @functools.cached_property
    def measures(self) -> dict[tuple[str, str], tuple[Measure, Result]]:
        """By case and name; what the study measured last in place of what was carried over."""
        ordered = sorted(self.results, key=lambda result: not result.carried_over)
        return {(m.case, m.name): (m, result) for result in ordered for m in result.measures}

    def part(self, part: str) -> list[Result]:
        """The results that the cases of a part are from."""
        found = [r for (case, _), (_, r) in self.measures.items() if case.split("/")[0] == part]
        return list({id(result): result for result in found}.values())

    def rate(self, part: str, population: str, name: str) -> Rate | None:
        """Alarms on a row, or on ``honest`` models (of both kinds); None if nothing was judged."""
        cases = HONEST if population == "honest" else (population,)
        found = [self.measures.get((f"{part}/{case}", name)) for case in cases]
        there = [held[0] for held in found if held is not None]
        if not there:
            return None
        return Rate(sum(round(m.value * m.n) for m in there), sum(m.n for m in there))

    def value(self, case: str, name: str) -> float:
        """One number."""
        return self.measures[case, name][0].value

    def calibration(self) -> dict[str, Any]:
        """``thresholds.json``: its rule applied to the calibration half."""
        used, held_out = (
            round(self.value(CALIBRATION, "models")), self.rate(HELD_OUT, "honest", "weights"),
        )  # fmt: skip
        (result,) = self.part(CALIBRATION)
        statistics = {}
        for name in holdings.CALIBRATED:
            largest, second, median = (
                self.value(CALIBRATION, f"{what}/{name}")
                for what in ("largest", "second", "median")
            )
            statistics[name] = {
                "threshold": thresholds.calibrated({"largest": largest, "second": second}),
                "largest": largest,
                "median": median,
            }
        return {
            "schema": "leakatlas/lint-thresholds/1",
            "rule": thresholds.RULE,
            "benign": f"{used} benign models to calibrate, {held_out.n if held_out else 0} held "
            "out: random initialisations and checkpoints of honest runs.",
            "command": result.command,
            "date": result.date,
            "statistics": statistics,
        }

    def page(self, calibration: Mapping[str, Any]) -> str:
        """The page; the fresh hold-out has its section if it judged the thresholds in use."""
        rows = [row for row in ROWS if self.rate(HELD_OUT, row, "weights")]
        in_use = thresholds.fingerprint(
            {n: row["threshold"] for n, row in calibration["statistics"].items()}
        )
        judged_with = {
            measure.value
            for (case, name), (measure, _) in self.measures.items()
            if case.split("/")[0] == FRESH and name == "thresholds"
        }
        fresh = judged_with == {in_use}
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("leakatlas.site"),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # Markdown of our own figures
            keep_trailing_newline=True,
        )
        environment.globals.update(
            table=_table, rate=self.rate, short=_short, count=_count, share=_share,
            made=lambda part: [_made(result) for result in self.part(part)],
        )  # fmt: skip
        text = environment.get_template("lint.md.j2").render(
            calibration=calibration, words=STATISTICS, rows=rows, fresh=fresh,
            title=[f"[{loader.printed_number(loader.attack(row))}] {row}" for row in rows],
            holdings=holdings.HOLDINGS, checks=EXPECTED, detectors=holdings.DETECTORS,
            mark=lambda check, row: EXPECTED[check][ROWS.index(row)],
            levels=sorted(
                [*holdings.LEVELS, *((held, 0.5) for held in {h for h, _ in holdings.LEVELS})]
            ),
            pooled=self._pooled, played=[self._played(row) for row in rows],
            better=self._better(rows) if fresh else [],
            missed=[
                row for row in rows
                if fresh and not _hits(self.rate(FRESH, row, list(holdings.HOLDINGS)[-1]))
            ],
        )  # fmt: skip
        return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"

    def _pooled(self, name: str) -> Rate | None:
        """Hits over all rows of the held-out part."""
        found = [self.rate(HELD_OUT, row, name) for row in ROWS]
        there = [rate for rate in found if rate is not None]
        return Rate(sum(r.hits for r in there), sum(r.n for r in there)) if there else None

    def _played(self, row: str) -> tuple[str, int, str, str, str]:
        prefix = "models of "
        counts = {
            name.removeprefix(prefix): measure.value
            for (case, name), (measure, _) in self.measures.items()
            if case == f"{HELD_OUT}/{row}" and name.startswith(prefix)
        }
        where = ", ".join(name for name, count in counts.items() if count)
        not_on = ", ".join(name for name, count in counts.items() if not count) or "none"
        note = self.measures[f"{HELD_OUT}/{row}", "weights"][0].note
        return row, round(sum(counts.values())), where, not_on, note or "default"

    def _better(self, rows: list[str]) -> list[str]:
        """Each of our detectors against each published one: rows with intervals apart."""
        lines = []
        for theirs in (d for d in holdings.DETECTORS if d.startswith("2")):
            for own in (d for d in holdings.DETECTORS if d.startswith("D1-")):
                better: dict[str, list[str]] = {own: [], theirs: []}
                for population in ("honest", *rows):
                    pair = [self.rate(FRESH, population, d) for d in (own, theirs)]
                    if pair[0] is None or pair[1] is None:
                        continue
                    (low, high), (low_theirs, high_theirs) = pair[0].interval, pair[1].interval
                    fewer = population == "honest"
                    name = "false alarms" if fewer else population
                    if low > high_theirs:
                        better[theirs if fewer else own].append(name)
                    elif low_theirs > high:
                        better[own if fewer else theirs].append(name)
                told = "; ".join(f"{who} on {', '.join(on)}" for who, on in better.items() if on)
                lines.append(f"{own} against {theirs}: {told or 'neither on any row'}.")
        return lines


def _table(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _hits(rate: Rate | None) -> int:
    return 0 if rate is None else rate.hits


def _short(rate: Rate | None) -> str:
    if rate is None:
        return "cannot run"
    return "{:.2f} ({:.2f}-{:.2f})".format(rate.share, *rate.interval)


def _count(rate: Rate | None) -> str:
    if rate is None:
        return "cannot run"
    return "{} of {} ({:.3f}-{:.3f})".format(rate.hits, rate.n, *rate.interval)


def _share(rate: Rate | None) -> str:
    return "cannot run" if rate is None else f"{rate.share:.2f}"


def _made(result: Result) -> str:
    words = f"`{result.command}` on {result.date} ({result.hardware})"
    note = result.recipe.get("made")
    if result.carried_over:
        words += f", carried over from before there were study files; again by `{result.again}`"
    return f"{words}; {note}" if isinstance(note, str) else words
