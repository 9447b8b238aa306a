"""How described measures relate to the PSNR that attacks reach: rank correlations over a study.

The attacks are the values of the last axis; each is held against the measures of the first, which
meets the same batches.

=========  =========================================================================================
scope      ranks
=========  =========================================================================================
pooled     over all trials: mostly differences between networks, batch sizes and defenses
fedavg     the same over the trials in which clients take several local steps
within     within each set-up, then correlated together: one batch against another
image      within each batch, for measures that have a value for every example
=========  =========================================================================================

Each is oriented: positive means that the measure is right about the direction that its note claims.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from leakatlas.bench.looks import EACH
from leakatlas.bench.record import Record
from leakatlas.bench.schema import OwnMeasure
from leakatlas.bench.study import Study
from leakatlas.fl import stream
from leakatlas.metrics.ranks import spearman


def figures(study: Study, records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """The correlations of every measure with what every attack reaches."""
    several = {  # set-ups in which clients take several local steps
        label.rpartition("/")[0]
        for label, case in study.cases.items()
        if case.protocol.get("algorithm") == "fedavg"
    }
    for attack in dict.fromkeys(label.rpartition("/")[2] for label in records):
        for measure in next(iter(study.cases.values())).measures:
            if isinstance(measure, OwnMeasure) and not measure.name.endswith(EACH):
                yield from _of_measure(measure, attack, records, several)


def _of_measure(
    measure: OwnMeasure,
    attack: str,
    records: Mapping[str, Sequence[Record]],
    several: Collection[str],
) -> Iterator[dict[str, Any]]:
    sign = -1.0 if "lower" in measure.note else 1.0
    batches: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    images: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for setup, measured, scores in _pairs(records, attack):
        psnr = [float(image["psnr"]) for image in scores["images"]]
        for value in measured.own.get(measure.name, ()):
            batches[setup].append((sign * value, sum(psnr) / len(psnr)))
        each = measured.own.get(measure.name + EACH, ())
        if len(psnr) > 1 and len(each) == len(psnr):
            images[setup, measured.seed] += zip([sign * v for v in each], psnr, strict=True)
    local = {setup: pairs for setup, pairs in batches.items() if setup in several}
    for scope, groups, within in (
        ("pooled", batches, False), ("fedavg", local, False), ("within", batches, True),
        ("image", images, True),
    ):  # fmt: skip
        name = f"spearman {scope}/{attack}/{measure.name}"
        found = spearman(groups, within=within, generator=stream(name))
        if found is not None:
            yield {
                "name": name, "value": found.value, "unit": "", "interval": found.interval,
                "interval_by": "bootstrap", "n": found.n, "images": found.n, "note": measure.note,
            }  # fmt: skip


def _pairs(
    records: Mapping[str, Sequence[Record]], attack: str
) -> Iterator[tuple[str, Record, Mapping[str, Any]]]:
    """Set-up, the record that holds the measures, and the attack's scores, batch by batch."""
    for label, mine in records.items():
        setup, _, which = label.rpartition("/")
        if which == attack:
            first = next(other for other in records if other.rpartition("/")[0] == setup)
            measured = {(r.seed, r.batch): r for r in records[first]}
            for record in mine:
                if (record.seed, record.batch) in measured and record.scores is not None:
                    yield setup, measured[record.seed, record.batch], record.scores
