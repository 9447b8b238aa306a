"""The first page of a report: what an impact assessment asks, in one look."""

from __future__ import annotations

from collections import Counter
from typing import Any

from leakatlas.report.data import Comparison, Report
from leakatlas.report.tally import Tally
from leakatlas.report.words import RECOGNISABLE_PSNR, TONE, rank, recognisable
from leakatlas.threat import LETTERS, Knowledge

KNOWLEDGE_WORDS = {
    Knowledge.UPDATES: "updates",
    Knowledge.BASIC: "pixel space",
    Knowledge.TRAINING: "training details",
    Knowledge.SURROGATE: "similar data",
    Knowledge.DISTRIBUTION: "client statistics",
    Knowledge.MANIPULATION: "tampers with the model",
    Knowledge.SELECTION: "chooses clients",
}

NOT_ASSESSED = (
    ("Membership inference", "was a person's record in the training?",
     "ML Privacy Meter, LeakPro, IBM ART"),
    ("Attribute inference", "an unknown attribute of a known person",
     "IBM ART; TAPAS for synthetic data"),
    ("Property inference", "facts about a client's data as a whole",
     "research code only, as far as we know"),
    ("Inversion or extraction of the trained model", "through its released weights or queries",
     "LeakPro, IBM ART"),
    ("Collusion", "of several clients, or of clients and server",
     "no tool known; for secure aggregation, its threshold"),
)  # fmt: skip
"""What this audit says nothing about, in a few words, and the tools that do."""


def summary(report: Report) -> dict[str, Any]:
    """What the template of the first page is given."""
    recovered = report.recovered()
    rows = []
    for standing in report.standings():
        model = LETTERS[standing.letter]
        rows.append(
            {
                "letter": standing.letter,
                "name": model.name,
                "capability": "malicious" if model.active else "honest-but-curious",
                "played_by": report.context.adversaries.get(standing.letter, ""),
                "sides": [
                    (verdict, TONE[verdict], found)
                    for verdict, found in zip(
                        (standing.deployed, standing.bound),
                        recovered[standing.letter],
                        strict=True,
                    )
                ],
            }
        )
    return {
        "bar": RECOGNISABLE_PSNR,
        "context": report.context.lines(),
        "rows": rows,
        "sentences": _sentences(report),
        "scope": _scope(report),
        "mitigations": [_mitigation(c, report) for c in report.comparisons],
        "guarantees": [
            {**one, "setting": setting}
            for setting, some in report.facts["guarantees"]["settings"].items()
            for one in some
        ],
        "not_assessed": NOT_ASSESSED,
        "triggers": _triggers(report),
    }


def _sentences(report: Report) -> list[str]:
    """What the best informed adversary of each capability reached as deployed, in full."""
    recovered = report.recovered()
    said = []
    for active in (False, True):
        letters = [letter for letter in report.letters if LETTERS[letter].active == active]
        found = {letter: recovered[letter][0] for letter in letters}
        scored = {letter: one for letter, one in found.items() if one is not None}
        if not scored:
            continue
        # Of equals the one that knows least: it is the more telling.
        letter = max(scored, key=lambda name: scored[name].recovered)
        said.append(_sentence(report, letter, scored[letter]))
    return said


def _sentence(report: Report, letter: str, found: Tally) -> str:
    model = LETTERS[letter]
    holds = ", ".join(words for flag, words in KNOWLEDGE_WORDS.items() if flag & model.knowledge)
    who = report.context.adversaries.get(letter, "").rstrip(".")
    places = "; ".join(dict.fromkeys(s["vantage"] for s in report.facts["settings"]))
    return (
        f"With this configuration, adversary {letter}{f' ({who})' if who else ''}, who holds or "
        f"does: {holds}, at the vantage {places}, {found.in_words()}."
    )


def _scope(report: Report) -> dict[str, Any]:
    """What was tried, and what was not."""
    attacks: dict[str, set[str]] = {}
    for run in report.runs:
        attacks.setdefault("tried" if run.tried else run.status, set()).add(run.attack)
    tried = attacks.pop("tried", set())
    left = {status: sorted(names - tried) for status, names in attacks.items()}
    statuses = Counter(run.status for run in report.runs if run.tried)
    return {
        "tried": len(tried),
        "left": [(status, len(names)) for status, names in sorted(left.items()) if names],
        "cut": statuses["cut short"],
        "settings": [
            f"{s['images']} images, seed {report.facts['seed']}, "
            f"{'captured' if s['captured'] else 'simulated'} update, model {s['model_hash'][:12]}"
            for s in report.facts["settings"]
        ],
    }


def _mitigation(comparison: Comparison, report: Report) -> dict[str, Any]:
    """Leakage under a set of defenses, its price, its formal guarantee."""
    seen = [recognisable(run.scores) for run in comparison.runs if run.scores is not None]
    per_image = [any(image) for image in zip(*seen, strict=False)]
    worst = max((run.verdict for run in comparison.runs), key=rank, default="not tested")
    undefended = report.comparisons[0].accuracy
    price = (
        None
        if comparison.accuracy is None or undefended is None or comparison is report.comparisons[0]
        else 100 * (comparison.accuracy - undefended)
    )
    return {
        "name": comparison.name,
        "verdict": worst,
        "tone": TONE[worst],
        "recovered": f"{sum(per_image)} of {len(per_image)}" if per_image else "–",
        "price": price,
        "guarantees": report.facts["guarantees"]["comparisons"].get(comparison.name, []),
    }


def _triggers(report: Report) -> list[str]:
    """What would make this audit out of date, with today's values."""
    facts = report.facts
    records = "; ".join(dict.fromkeys(found.cadence() for found in report.realism))
    defenses = {d["key"] for s in facts["settings"] for d in s["defenses"]}
    expires = report.context.expires
    return [
        f"the model's architecture or weights ({facts['model']}, "
        f"{', '.join(dict.fromkeys(s['model_hash'][:12] for s in facts['settings']))})",
        f"images per update, local epochs, loss, augmentation or what is shared ({records})",
        f"the defenses or their parameters ({', '.join(sorted(defenses)) or 'none in force'})",
        "the FL framework, the network, or who plays a role",
        f"LeakAtlas or its catalogue ({facts['leakatlas']}, {facts['catalogue']} attacks)",
        f"the day {expires.isoformat()}{' has passed' * (expires.isoformat() < facts['date'])}"
        if expires
        else "a date of your choice (context: expires)",
    ]
