"""``docs/lint.md`` from the results of the detector study, and from nothing else.

``python benchmarks/lint_page.py`` writes it anew; ``benchmarks/lint.py`` calls it after a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from leakatlas.catalogue import loader
from leakatlas.lint import STATISTICS

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = "src/leakatlas/lint/thresholds.json"

# The matrix that the survey of these attacks predicts: decisive, supporting, nothing.
EXPECTED_COLUMNS = (
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


def fingerprint(thresholds: Path) -> str:
    """SHA-256 of a file of thresholds."""
    return hashlib.sha256(thresholds.read_bytes()).hexdigest()


def page(root: Path) -> str:
    """The page; the fresh hold-out has its section if it judged the thresholds in use."""
    calibration = _read(root / THRESHOLDS)
    result = _read(root / "results/lint/detectors.json")
    held_out = root / "results/lint/fresh.json"
    fresh = _read(held_out) if held_out.is_file() else None
    if fresh and fresh["recipe"]["thresholds"] != fingerprint(root / THRESHOLDS):
        fresh = None  # other thresholds: what it says is no longer about these
    named, new = _named(result), _named(fresh) if fresh else {}
    keys = [n.split("/")[1] for n in named if n.startswith("hit/") and n.endswith("/weights")]
    holdings = [n.split("/")[1] for n in named if n.startswith("false_alarm/weights")]
    detectors = [n.split("/")[1] for n in new if n.startswith("beside/") and n.endswith("_alarm")]
    title = {key: f"[{loader.printed_number(loader.attack(key))}] {key}" for key in keys}

    def rate(name: str) -> str:
        low, high = named[name]["interval"]
        return f"{named[name]['value']:.2f} ({low:.2f}-{high:.2f})"

    def count(name: str) -> str:
        if name not in new:
            return "cannot run"
        (low, high), n = new[name]["interval"], new[name]["n"]
        return f"{round(new[name]['value'] * n)} of {n} ({low:.3f}-{high:.3f})"

    def mark(check: str, key: str) -> str:
        return dict(zip(EXPECTED_COLUMNS, EXPECTED[check], strict=True)).get(key, "")

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown of our own figures
        keep_trailing_newline=True,
    )
    text = environment.get_template("lint.md.j2").render(
        result=result, calibration=calibration, fresh=fresh, words=STATISTICS,
        keys=keys, title=list(title.values()), holdings=list(dict.fromkeys(holdings)),
        checks=[check for check in EXPECTED if f"false_alarm/{check}" in named],
        played=list(_played(named, result["recipe"], keys)), detectors=detectors,
        better=_better(new, keys, detectors), table=_table, rate=rate, count=count, mark=mark,
        value=lambda name: named[name]["value"], fresh_value=lambda name: new[name]["value"],
        told="; ".join(
            f"{a['model']}: {', '.join(a['by'])}" for a in (fresh or {"recipe": {"alarms": []}})
            ["recipe"]["alarms"]
        ) or "none",
        missed=[title[k] for k in keys if new and new[f"hit/{k}/{holdings[-1]}"]["value"] == 0],
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _table(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _played(
    named: Mapping[str, Any], recipe: Mapping[str, Any], keys: list[str]
) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for key in dict.fromkeys([*keys, *recipe["refused"]]):
        measure = named.get(f"hit/{key}/weights", {"n": 0, "note": "on none"})
        refused = ", ".join(recipe["refused"].get(key, {})) or "none"
        reduced = ", ".join(f"{n}={v}" for n, v in recipe["reduced"].get(key, {}).items())
        settings = f"reduced: {reduced}" if reduced else "default"
        rows.append((key, measure["n"], measure["note"].removeprefix("on "), refused, settings))
    return rows


def _better(new: Mapping[str, Any], keys: list[str], detectors: list[str]) -> list[str]:
    """Each of our detectors against each published one: rows with intervals apart."""
    ours = [d for d in detectors if d.startswith("D1-")]
    lines = []
    for theirs in (d for d in detectors if d.startswith("2")):
        for own in ours:
            better: dict[str, list[str]] = {own: [], theirs: []}
            for label in ("false_alarm", *(f"hit/{key}" for key in keys)):
                pair = [f"beside/{d}/{label}" for d in (own, theirs)]
                if not all(name in new for name in pair):
                    continue
                (low, high), (low_theirs, high_theirs) = (new[name]["interval"] for name in pair)
                row = label.removeprefix("hit/").replace("_alarm", " alarms")
                fewer = label == "false_alarm"
                if low > high_theirs:
                    better[theirs if fewer else own].append(row)
                elif low_theirs > high:
                    better[own if fewer else theirs].append(row)
            told = "; ".join(f"{who} on {', '.join(rows)}" for who, rows in better.items() if rows)
            lines.append(f"{own} against {theirs}: {told or 'neither on any row'}.")
    return lines


def _named(result: Mapping[str, Any]) -> dict[str, Any]:
    return {measure["name"]: measure for measure in result["measures"]}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    (ROOT / "docs/lint.md").write_text(page(ROOT), encoding="utf-8")
