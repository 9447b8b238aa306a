"""Writing a report to a folder."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from leakatlas import sealed
from leakatlas.errors import InvalidInput, shown
from leakatlas.report.data import Comparison, Report
from leakatlas.report.realism import Standing
from leakatlas.report.run import Run
from leakatlas.report.schema import report_schema
from leakatlas.report.summary import KNOWLEDGE_WORDS, summary
from leakatlas.report.words import (
    RECOGNISABLE_PSNR,
    TONE,
    VERDICTS,
    Verdict,
    beside,
    rank,
    recognisable,
)
from leakatlas.threat import LETTERS

PICTURES = "reconstructions"
"""Folder of the reconstructions as PNG files."""


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.html``, ``report.json`` and ``report.schema.json`` into ``folder``.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: If the folder cannot be written; the report itself is unharmed.
    """
    content = {
        "report.json": json.dumps(report.to_json(), indent=1, allow_nan=False),
        "report.schema.json": json.dumps(report_schema(), indent=1),
        "report.html": render_page(report),
    }
    try:
        for name, text in content.items():
            sealed.write_whole(folder / name, text.encode())
        write_pictures(report, folder / PICTURES)
    except OSError as problem:
        raise InvalidInput(
            f"The report cannot be written to {str(folder)!r} ({problem.strerror})"
        ) from None
    return folder / "report.html"


def write_pictures(report: Report, folder: Path) -> None:
    """Write every reconstruction as ``<setting>/<attack>/client-<c>-image-<i>.png``.

    Under an alternative defense, its name follows the setting's. An image that an attack did not
    return has no file.
    """
    cases = [(run.setting, run) for run in _all(report)]
    for comparison in report.comparisons[1:]:
        cases += [(f"{run.setting}, {comparison.name}", run) for run in comparison.runs]
    names: dict[str, str] = {}
    for setting, run in cases:
        if setting not in names:
            plain = re.sub(r"\W+", "-", setting, flags=re.ASCII).strip("-").lower()[:60]
            names[setting] = f"{plain}-{len(names)}" if plain in names.values() else plain
        if run.scores is None or run.pictures is None:
            continue
        place = folder / names[setting] / re.sub(r"\W+", "-", run.attack, flags=re.ASCII)
        for index, (pair, image) in enumerate(zip(run.pictures, run.scores.images, strict=False)):
            if image.candidate is not None:
                sealed.write_whole(place / f"client-{run.target}-image-{index}.png", _png(pair[1]))


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try it, before any compute.

    Raises:
        InvalidInput: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise InvalidInput(
            f"The output folder {shown(str(folder))} cannot be written ({reason}); choose "
            "another with --out. Nothing was computed yet."
        ) from None


def render_page(report: Report) -> str:
    """The page as one string without a single external reference; every value is escaped."""
    import jinja2  # a run that writes no page does without

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("leakatlas.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=_headline(report),
        summary=summary(report),
        letters=[_letter_row(standing) for standing in report.standings()],
        galleries=_galleries(report),
        unscored=_unscored(report),
        strips=_strips(report),
        comparisons=[_comparison_row(c, report.comparisons[0]) for c in report.comparisons],
        chart=_chart(report.comparisons),
        runs=[_run_row(run) for run in _all(report) if run.tried or run.status == "error"],
        ordered=ORDERED if any(run.recipe.get("rehearsal") for run in report.runs) else "",
        tried=sum(run.tried for run in report.runs),
        skipped=_skipped(report),
        undecided=report.undecided(),
        strangers=[s["name"] for s in report.facts["settings"] if s["strangers"]],
        spared=report.spared(),
        worst=report.worst_case(),
        source=json.dumps(dict(report.source), indent=2) if report.source else "",
    )


def _headline(report: Report) -> dict[str, Any]:
    standings = report.standings()
    seen: dict[tuple[str, int, int], bool] = {}
    for run in report.runs:
        if run.scores is not None:
            for position, came_out in enumerate(recognisable(run.scores)):
                key = (run.setting, run.target, position)
                seen[key] = seen.get(key, False) or came_out
    return {
        "deployed": _groups([(s.letter, s.deployed) for s in standings]),
        "bound": _groups([(s.letter, s.bound) for s in standings]),
        "images": len(seen),
        "exact": int(sum(report.worst_case()["exact"])),
        "seen": sum(seen.values()),
    }  # fmt: skip


def _groups(verdicts: Sequence[tuple[str, Verdict]]) -> list[tuple[str, str, str]]:
    """Verdict, the letters that it holds for, and its tone; the strongest first."""
    groups = {
        word: [letter for letter, found in verdicts if found == word] for word in reversed(VERDICTS)
    }
    return [(word, ", ".join(who), TONE[word]) for word, who in groups.items() if who]


def _all(report: Report) -> list[Run]:
    """The runs as configured, then those of the other verdict."""
    return [*report.runs, *(run for found in report.realism for run in found.runs)]


def _letter_row(standing: Standing) -> dict[str, Any]:
    model = LETTERS[standing.letter]
    sides = (
        ("As deployed", standing.deployed, standing.deployed_run),
        ("Upper bound", standing.bound, standing.bound_run),
    )
    return {
        "letter": standing.letter,
        "name": model.name,
        "knows": [words for flag, words in KNOWLEDGE_WORDS.items() if flag & model.knowledge],
        "sides": [
            {
                "head": head,
                "verdict": verdict,
                "tone": TONE[verdict],
                "run": None if run is None else _run_row(run),
            }
            for head, verdict, run in sides
        ],
        "between": standing.between,
    }


def _run_row(run: Run) -> dict[str, Any]:
    scores = run.scores
    row: dict[str, Any] = {
        "setting": run.setting,
        "attack": run.attack,
        "letter": run.letter,
        "vantage": run.vantage,
        "target": run.target,
        "status": run.status,
        "reason": run.reason,
        "verdict": run.verdict,
        "tone": TONE[run.verdict],
        "seconds": run.seconds,
        "rounds": run.rounds,
        "reads": ", ".join(run.reads),
        "execution": run.execution,
        "rehearsal": rehearsal_in_words(run.recipe.get("rehearsal") or {}),
        "notes": sorted(run.notes.items()),
        "scored": scores is not None,
        "confidence": [f"{value:.4g}" for value in run.confidence],
    }
    if scores is not None:
        row |= {
            "psnr": scores.psnr.mean,
            "psnr_low": scores.psnr.mean_interval.low,
            "psnr_high": scores.psnr.mean_interval.high,
            "best": beside(scores.psnr.max, RECOGNISABLE_PSNR),
            "ssim": None if scores.ssim is None else scores.ssim.mean,
            "exact": scores.success["exact"].successes,
            "originals": scores.originals,
            "candidates": scores.candidates,
            "missing": scores.missing,
            "surplus": scores.surplus,
            "gain": f"{'+' if scores.gain > 0 else ''}{beside(scores.gain, 0.0)}",
            "baseline": scores.best_baseline.replace("_", " "),
            "labels": None if scores.labels is None else scores.labels.irec,
        }
    return row


ORDERED = (
    "Attacks that iterate had their turn and their part of the time by what they rehearsed; those "
    "that change the model, and closed forms, in a fixed order: a rehearsal of one would take as "
    "much as the attempt itself, so the attempt was made."
)
"""How the order of attacks came about."""


def rehearsal_in_words(told: Mapping[str, Any]) -> str:
    """How the adversary chose the parameters of a run; empty if it did not.

    Args:
        told: What the recipe says of the rehearsal.
    """
    if "refused" in told:
        return f"not rehearsed: {told['refused']}"
    if not told:
        return ""
    tried = len({trial["variant"] for trial in told["trials"]})
    length = told["iterations"]
    short = told["planned"] is not None and length < told["planned"]
    paid = "kept from before" if told["cached"] else f"{told['seconds']:.0f} s"
    words = (
        f"rehearsed on {told['images']}: {told['variant']!r}, best of {tried}, rebuilt "
        f"{told['psnr']:.1f} dB against {told['null']:.1f} dB of the mean image ({paid})"
    )
    if short:
        words += f", in trials of {length} iterations where {told['planned']} were planned"
    if contradicted := told.get("ruled_out"):
        words += f"; the settings given rule out {', '.join(map(repr, contradicted))}"
    if rule := told.get("labels"):
        words += _of_labels(rule)
    if told["psnr"] <= told["null"]:
        words += "; no better than the mean image, hence tried last"
    return words


def _of_labels(rule: Mapping[str, Any]) -> str:
    """Which rule read the labels, and how far it can be trusted."""
    untried = ", ".join(map(repr, rule.get("untried", ())))
    late = f"; the budget left no time for the label rules {untried}" if untried else ""
    if not rule["rule"]:
        return f"; no rule reads labels of such an update{late}"
    right, least = (f"{100 * rule[name]:.0f} %" for name in ("right", "trust"))
    return (
        f"; labels by {rule['rule']!r}, which read all labels of {right} of {rule['batches']} own "
        f"batches that surprised the network as much (so of at least {least} of such batches, with "
        f"95 % confidence), and {100 * rule['overlap']:.0f} % of the labels{late}"
    )


def _galleries(report: Report, most: int = 8) -> list[tuple[str, list[dict[str, Any]]]]:
    """Per setting, the strongest passive and the strongest active attack, with pictures."""
    galleries: dict[str, list[dict[str, Any]]] = {}
    every = _all(report)
    for setting in dict.fromkeys(run.setting for run in every):
        for active in (False, True):
            runs = [
                run for run in every
                if run.setting == setting and (run.letter in "FGH") == active
                and run.scores is not None and run.pictures is not None
            ]  # fmt: skip
            if not runs:
                continue
            best = max(runs, key=_strength)
            same = [run for run in runs if run.attack == best.attack]
            pairs = [pair for run in same for pair in _pairs(run)]
            mean, null = (
                statistics.fmean(values)
                for values in zip(
                    *(
                        (run.scores.psnr.mean, run.scores.baselines[run.scores.best_baseline].psnr)
                        for run in same
                        if run.scores is not None
                    ),
                    strict=True,
                )
            )
            galleries.setdefault(setting, []).append(
                {
                    "run": _run_row(best),
                    "pairs": pairs[:most],
                    "mean": beside(mean, null),
                    "null": beside(null, mean),
                }
            )
    return list(galleries.items())


def _unscored(report: Report, most: int = 16) -> list[dict[str, Any]]:
    """What was reconstructed without a truth to hold it against, with its own confidence."""
    return [
        {
            "run": _run_row(run),
            "images": [
                {"image": _data_uri(picture[0]), "confidence": own}
                for picture, own in itertools.zip_longest(
                    run.pictures[:most], _run_row(run)["confidence"][: len(run.pictures)]
                )
            ],
        }
        for run in report.runs
        if run.verdict == "not scored" and run.pictures is not None
    ]


def _pairs(run: Run) -> list[dict[str, Any]]:
    if run.scores is None or run.pictures is None:
        return []
    return [
        {
            "original": _data_uri(pair[0]),
            "candidate": None if image.candidate is None else _data_uri(pair[1]),
            "psnr": beside(image.psnr, RECOGNISABLE_PSNR),
            "exact": image.exact,
        }
        for pair, image in zip(run.pictures, run.scores.images, strict=False)
    ]


def _strips(report: Report) -> list[dict[str, Any]]:
    """For each attack of the comparison: the private image, then what came out per defense."""
    strips: dict[str, dict[str, Any]] = {}
    for comparison in report.comparisons:
        for run in comparison.runs:
            for pair in _pairs(run)[:1]:
                strip = strips.setdefault(
                    run.attack,
                    {
                        "attack": run.attack,
                        "letter": run.letter,
                        "original": pair["original"],
                        "cells": [],
                    },
                )
                strip["cells"].append({"name": comparison.name, **pair})
    return list(strips.values())


def _strength(run: Run) -> tuple[int, float]:
    return (rank(run.verdict), run.scores.psnr.mean if run.scores else 0.0)


def _comparison_row(comparison: Comparison, undefended: Comparison) -> dict[str, Any]:
    cost = (
        None
        if comparison.accuracy is None or undefended.accuracy is None
        else 100 * (undefended.accuracy - comparison.accuracy)
    )
    worst = max((run.verdict for run in comparison.runs), key=rank, default="not tested")
    return {
        "name": comparison.name,
        "defenses": ", ".join(str(d["key"]) for d in comparison.defenses) or "none",
        "runs": [_run_row(run) for run in comparison.runs],
        "accuracy": comparison.accuracy,
        "cost": cost,
        "reason": comparison.reason,
        "verdict": worst,
        "tone": TONE[worst],
    }


def _chart(comparisons: tuple[Comparison, ...]) -> dict[str, Any] | None:
    """Points of the privacy-utility picture: accuracy against the worst mean PSNR."""
    points = []
    for number, comparison in enumerate(comparisons, start=1):
        scored = [run.scores.psnr.mean for run in comparison.runs if run.scores is not None]
        if comparison.accuracy is not None and scored:
            points.append((number, comparison.name, 100 * comparison.accuracy, max(scored)))
    if len(points) < 2:
        return None
    width, height, left, bottom = 640.0, 300.0, 56.0, 44.0
    low = min(10.0 * int(p[2] // 10) for p in points)
    top = max(40.0, *(p[3] for p in points))

    def x(accuracy: float) -> float:
        return left + (accuracy - low) / (100.0 - low + 1e-9) * (width - left - 24)

    def y(psnr: float) -> float:
        return 16 + (1 - psnr / top) * (height - bottom - 16)

    return {
        "width": width,
        "height": height,
        "points": [
            {"number": n, "name": name, "x": x(a), "y": y(p), "accuracy": a, "psnr": p}
            for n, name, a, p in points
        ],
        "x_ticks": [(x(v), f"{v:.0f}") for v in np.linspace(low, 100, 6)],
        "y_ticks": [(y(v), f"{v:.0f}") for v in range(0, int(top) + 1, 20 if top > 60 else 10)],
        "floor": height - bottom,
        "left": left,
        "threshold": y(RECOGNISABLE_PSNR),
    }


def _skipped(report: Report) -> list[dict[str, str]]:
    """Attacks that were not tried, one line for each reason, with the settings it holds for."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for run in report.runs:
        if not run.tried and run.status != "error":
            lines.setdefault((run.attack, run.status, run.reason), []).append(run.setting)
    return [
        {
            "attack": attack,
            "status": status,
            "reason": reason,
            "settings": "; ".join(dict.fromkeys(settings)),
        }
        for (attack, status, reason), settings in lines.items()
    ]


def _data_uri(image: Tensor) -> str:
    """An image ``(C, H, W)`` in [0, 1] as a PNG data URI."""
    return "data:image/png;base64," + base64.b64encode(_png(image)).decode()


def _png(image: Tensor) -> bytes:
    """An image ``(C, H, W)`` in [0, 1] as PNG; of any other number of channels but 3 the first."""
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
    array = pixels[0] if pixels.shape[0] != 3 else np.moveaxis(pixels, 0, -1)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
