"""From records to the figures of ``results/<study>.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import ValidationError

import leakatlas
from leakatlas.bench import correlations, frontier, machine, own
from leakatlas.bench.cells import Cell, setup
from leakatlas.bench.measures import BINS, COSTS, MEASURES, NOTES
from leakatlas.bench.published import Published
from leakatlas.bench.record import Record
from leakatlas.bench.schema import Case, Comparison, OwnMeasure
from leakatlas.bench.study import Study, published_strengths
from leakatlas.catalogue import results
from leakatlas.errors import InvalidInput
from leakatlas.fl import stream
from leakatlas.metrics.intervals import binomial, bootstrap

SCHEMA = "leakatlas/result/2"
NOTHING = Published()

Unit = tuple[int, str]
"""What a value belongs to: a batch and an image in it, or a batch (its cell)."""

Values = dict[Unit, list[float]]
"""Values of one measure: one a seed for every unit."""


def document(
    study: Study, cells: Sequence[Cell], records: Mapping[str, Record], command: str,
    published: Published = NOTHING,
) -> dict[str, Any] | None:  # fmt: skip
    """The result file of a study, or None if no cell has a record yet.

    Args:
        study: The study.
        cells: All its cells, whether or not they were run.
        records: By cell.
        command: What makes the records again.
        published: What stands of the file as it was; such cases, and comparisons between two of
            them, are kept as they are.
    """
    done = {cell.name: records[cell.name] for cell in cells if cell.name in records}
    if not done:
        return None
    by_case: dict[str, list[Cell]] = {}
    for cell in cells:
        by_case.setdefault(cell.label, []).append(cell)
    cases = [
        published.cases.get(label) or _case(label, study.cases[label], mine, done)
        for label, mine in by_case.items()
        if label in published.cases or any(cell.name in done for cell in mine)
    ]
    if study.file.summary == "frontier":  # a thousand cases; the summary says what they share
        cases = [{**case, "curve": [], "nulls": []} for case in cases]
    known = published.together("machines", [dict(r.machine) for r in done.values()])
    machines = {machine.in_words(facts): facts for facts in known}
    days = sorted(published.together("dates", [r.started[:10] for r in done.values() if r.started]))
    ours = [f"leakatlas {leakatlas.__version__}", f"torch {torch.__version__}"]
    return {
        "schema": SCHEMA,
        "kind": "study",
        "key": study.name,
        "title": study.file.title,
        "question": study.file.question,
        "chosen": study.file.chosen,
        "command": command,
        "provenance": "measured",
        "versions": sorted(published.together("versions", ours)),
        "machines": [machines[name] for name in sorted(machines) if name],
        "hardware": "; ".join(name for name in sorted(machines) if name) or "unknown",
        "dates": [days[0], days[-1]] if days else [],
        "seeds": sorted({cell.seed for cell in cells}),
        "cases": cases,
        "compare": [
            comparison
            for pair in study.file.compare
            if (comparison := _compared(pair, study, by_case, done, published)) is not None
        ],
        "summary": _summary(study, by_case, done),
    }


def _summary(
    study: Study, cells: Mapping[str, Sequence[Cell]], records: Mapping[str, Record]
) -> list[dict[str, Any]]:
    """The figures over all cases that the study computes itself."""
    done = {
        label: [records[cell.name] for cell in mine if cell.name in records]
        for label, mine in cells.items()
    }
    found = list(correlations.figures(study, done)) if study.file.correlate else []
    if study.file.summary == "frontier":
        found += frontier.summarise(
            done, published_strengths(), {label: len(mine) for label, mine in cells.items()}
        )
    elif study.file.summary:
        assert study.hook is not None
        summarise = own.function(
            study.hook, study.name, "summarise", "(study, records) -> figures",
            f"the summary of study {study.name!r}",
        )  # fmt: skip
        found += summarise(study, done)
    try:
        return [
            results.StudyFigure.model_validate(figure).model_dump(mode="json") for figure in found
        ]
    except ValidationError as problem:
        first = problem.errors()[0]
        raise InvalidInput(
            f"{study.hook}: a figure of summarise(study, records) is malformed at "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None


def _case(
    label: str, case: Case, cells: Sequence[Cell], records: Mapping[str, Record]
) -> dict[str, Any]:
    mine = [records[cell.name] for cell in cells if cell.name in records]
    counts = Counter(record.status for record in mine)
    return {
        "case": label,
        "beside": None if case.beside is None else case.beside.model_dump(exclude_none=True),
        "letter": case.letter,
        "vantage": case.vantage,
        "setup": setup(case),
        "note": "; ".join(filter(None, (case.note, _confirmed(mine)))),
        "cells": len(cells),
        "missing": len(cells) - len(mine),
        "status": dict(sorted(counts.items())),
        "reasons": sorted({r.reason for r in mine if r.status in ("error", "refused")})[:5],
        "code": sorted({record.code for record in mine}),
        "version": _version(case),
        "measures": [
            figure
            for measure in case.measures
            if (figure := _figure(measure, mine, label)) is not None
        ],
        "nulls": _nulls(mine, label),
        "curve": _curve(mine, label),
    }


def _confirmed(records: Sequence[Record]) -> str:
    """What a reader must know of records that other code made."""
    old = sum(bool(record.confirmed) for record in records)
    if not old:
        return ""
    cells = "cell stands" if old == 1 else "cells stand"
    return (
        f"{old} of {len(records)} {cells} from earlier code: another cell of the case, made again, "
        "came out equal bit for bit"
    )


def _version(case: Case) -> int | None:
    if case.beside is None:
        return None
    if case.beside.attack is not None:
        return results.current_version("attack", case.beside.attack)
    return results.current_version("defense", str(case.beside.defense))


def _described(measure: str | OwnMeasure) -> tuple[str, bool, str, str]:
    """Name, whether it is a share, unit and note."""
    if isinstance(measure, OwnMeasure):
        return measure.name, measure.kind == "share", measure.unit, measure.note
    if measure in BINS:
        is_share, note = BINS[measure]
        return measure, is_share, "", note
    if measure in MEASURES:
        known = MEASURES[measure]
        return measure, known.kind.endswith("share"), known.unit, ""
    return measure, False, COSTS.get(measure, ""), ""


def values_of(measure: str | OwnMeasure, records: Iterable[Record]) -> Values:
    """The values of a measure, by the image (or the batch) that they belong to."""
    found: Values = {}
    for record in records:
        whole: Unit = (record.batch, "")
        if isinstance(measure, OwnMeasure) or measure in BINS:
            value = record.own.get(measure if isinstance(measure, str) else measure.name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            units = [(record.batch, str(i)) for i in range(len(values))]
            if not isinstance(value, list):
                units = [whole]
        elif measure in MEASURES:
            values = [] if record.scores is None else list(MEASURES[measure].read(record.scores))
            per_image = MEASURES[measure].kind.startswith("image")
            units = (
                [(record.batch, f"{i}:{image}") for i, image in enumerate(record.images)]
                if per_image
                else [whole]
            )
        else:
            held = record.notes if measure.startswith(NOTES) else record.costs
            value = held.get(measure.removeprefix(NOTES))
            values, units = ([] if value is None else [value]), [whole]
        for unit, number in zip(units, values, strict=False):
            found.setdefault(unit, []).append(float(number))
    return found


def _figure(
    measure: str | OwnMeasure, records: Sequence[Record], label: str
) -> dict[str, Any] | None:
    name, is_share, unit, note = _described(measure)
    values = values_of(measure, records)
    flat = [value for several in values.values() for value in several]
    if not flat:
        return None
    if is_share:
        # Seeds of one image are trials of their own only if there is one: the interval of a share
        # counts images, so that repeating a seed does not make it narrower.
        n = len(values)
        mean = sum(flat) / len(flat)
        hits = sum(sum(several) / len(several) for several in values.values())
        interval = binomial(min(n, round(hits)), n)
        low, high = min(interval.low, mean), max(interval.high, mean)
        kind: Literal["wilson", "bootstrap"] = "wilson"
    else:
        mean, low, high = mean_and_interval(values, label, name)
        kind = "bootstrap"
    return {
        "name": name, "value": mean, "unit": unit, "interval": [low, high], "interval_by": kind,
        "n": len(flat), "images": len(values), "note": note,
    }  # fmt: skip


def mean_and_interval(values: Values, *keys: str) -> tuple[float, float, float]:
    """Mean over all values, and its bootstrap interval over units: seeds of one move together.

    Of a single unit, such as a training, there are only seeds to resample.
    """
    several = [sum(v) / len(v) for v in values.values()]
    if len(several) == 1:
        (several,) = values.values()
    per_unit = torch.tensor(several, dtype=torch.float64)
    low, high = bootstrap(per_unit, generator=stream("figures", *keys))
    mean = float(per_unit.mean())
    return mean, min(low, mean), max(high, mean)


def _nulls(records: Sequence[Record], label: str) -> list[dict[str, Any]]:
    """PSNR of what an adversary without this update would hand in."""
    by_name: dict[str, Values] = {}
    for record in records:
        if record.scores is None:
            continue
        for name, baseline in record.scores["baselines"].items():
            unit = (record.batch, "")
            by_name.setdefault(name, {}).setdefault(unit, []).append(float(baseline["psnr"]))
    figures = []
    for name, values in sorted(by_name.items()):
        mean, low, high = mean_and_interval(values, label, name)
        figures.append(
            {"name": name, "value": mean, "unit": "dB", "interval": [low, high],
             "interval_by": "bootstrap", "n": sum(map(len, values.values())),
             "images": len(values), "note": "null baseline, PSNR; the interval resamples batches"}
        )  # fmt: skip
    return figures


POINTS = 24
"""Of a curve, at equal factors of time."""


def _curve(records: Sequence[Record], label: str) -> list[dict[str, Any]]:
    """Mean PSNR that the best iterates have reached after so many CPU seconds.

    A cell that has ended keeps what it reached; one that has not reported yet counts with its first
    report.
    """
    ways = [(record.batch, record.trace) for record in records if record.trace]
    if not ways:
        return []
    first = min(way[0][0] for _, way in ways)
    last = max(way[-1][0] for _, way in ways)
    points = []
    for number in range(POINTS):
        seconds = first * (last / first) ** (number / (POINTS - 1))
        values: Values = {}
        for batch, way in ways:
            by_then = [psnr for spent, psnr in way if spent <= seconds * (1 + 1e-9)]
            values.setdefault((batch, ""), []).append(by_then[-1] if by_then else way[0][1])
        mean, low, high = mean_and_interval(values, label, f"curve {number}")
        points.append({"seconds": seconds, "psnr": mean, "interval": [low, high]})
    return points


def _compared(
    pair: Comparison, study: Study, cells: Mapping[str, Sequence[Cell]],
    records: Mapping[str, Record], published: Published,
) -> dict[str, Any] | None:  # fmt: skip
    """The paired difference between two cases, on the units and seeds that both have."""
    sought = (pair.measure, pair.of, pair.minus)
    if {pair.of, pair.minus} & published.cases.keys():
        both = {pair.of, pair.minus} <= published.cases.keys()
        before: list[dict[str, Any]] = published.document.get("compare", []) if both else []
        return next((c for c in before if (c["name"], c["of"], c["minus"]) == sought), None)
    sides: list[dict[tuple[int, int], Record]] = []
    for label in (pair.of, pair.minus):
        mine = [records[cell.name] for cell in cells.get(label, ()) if cell.name in records]
        sides.append({(record.seed, record.batch): record for record in mine})
    described = [m for m in study.cases[pair.of].measures if isinstance(m, OwnMeasure)]
    measure = next((m for m in described if m.name == pair.measure), pair.measure)
    differences: Values = {}
    for key in sides[0].keys() & sides[1].keys():
        of, minus = (values_of(measure, [side[key]]) for side in sides)
        for unit in of.keys() & minus.keys():
            differences.setdefault(unit, []).append(of[unit][0] - minus[unit][0])
    if not differences:
        return None
    differences = dict(sorted(differences.items()))
    mean, low, high = mean_and_interval(differences, pair.of, pair.minus)
    return {
        "name": pair.measure, "of": pair.of, "minus": pair.minus, "value": mean,
        "unit": _described(measure)[2], "interval": [low, high], "interval_by": "bootstrap",
        "n": sum(map(len, differences.values())), "images": len(differences),
        "note": "paired difference",
    }  # fmt: skip
