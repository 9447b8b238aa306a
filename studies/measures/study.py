"""How every vulnerability measure relates to the PSNR that an attack reaches: rank correlations.

=========  =========================================================================================
scope      ranks
=========  =========================================================================================
pooled     over all trials: mostly differences between networks, batch sizes and defenses
fedavg     the same over the trials in which clients take several local steps
within     within each set-up, then correlated together: one batch against another
image      within each batch, for measures that have a value for every example
=========  =========================================================================================

Each is oriented: positive means that the measure is right about the direction it claims. The
measures are taken once for a batch, with the first attack; both attacks meet the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from leakatlas.bench.harness import Trial
from leakatlas.bench.record import Record
from leakatlas.bench.schema import OwnMeasure
from leakatlas.bench.study import Study
from leakatlas.fl import Stage, stream
from leakatlas.metrics import bootstrap
from leakatlas.vulnerability import Case, assess

FEWEST = 50
"""Correlations over fewer samples are noise and are not reported."""

EACH = ", by example"
Row = tuple[str, float, float]
"""Group, oriented measure, PSNR reached."""


def examine(trial: Trial, stage: Stage) -> dict[str, list[float]]:
    """Every measure of the batch; an empty list where one is not defined.

    To six digits: what differs less is rounding, not rank.
    """
    case = Case.of_stage(stage, record=trial.records[-1])
    found: dict[str, list[float]] = {}
    for measure in assess(case, tier="spectral", limit=64, steps=20, probes=2):
        value = measure.value
        found[measure.name] = [] if value is None else [_rounded(value)]
        parts = [_rounded(v) for n, v in measure.values.items() if n.startswith("example ")]
        found[measure.name + EACH] = parts
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def summarise(study: Study, records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """The correlations of every measure with what every attack reaches."""
    for attack in dict.fromkeys(label.rpartition("/")[2] for label in records):
        for measure in next(iter(study.cases.values())).measures:
            if isinstance(measure, OwnMeasure) and not measure.name.endswith(EACH):
                yield from _of_measure(measure, attack, records)


def _of_measure(
    measure: OwnMeasure, attack: str, records: Mapping[str, Sequence[Record]]
) -> Iterator[dict[str, Any]]:
    sign = -1.0 if "lower" in measure.note else 1.0
    rows: list[Row] = []
    images: list[Row] = []
    for setup, measured, reached in _pairs(records, attack):
        psnr = [float(image["psnr"]) for image in (reached.scores or {"images": ()})["images"]]
        for value in measured.own.get(measure.name, ()):
            rows.append((setup, sign * value, sum(psnr) / len(psnr)))
        each = measured.own.get(measure.name + EACH, ())
        if len(psnr) > 1 and len(each) == len(psnr):
            batch = f"{setup} {measured.seed}"
            images += [(batch, sign * v, q) for v, q in zip(each, psnr, strict=True)]
    local = [row for row in rows if "FedAVG" in row[0]]
    scopes = {
        "pooled": (_plain(rows), _spearman), "fedavg": (_plain(local), _spearman),
        "within": (_within(rows), _pearson), "image": (_within(images), _pearson),
    }  # fmt: skip
    for scope, (pairs, rho) in scopes.items():
        if len(pairs) >= FEWEST and not bool((pairs == pairs[0]).all(dim=0).any()):
            name = f"spearman {scope}/{attack}/{measure.name}"
            yield _figure(name, pairs, rho, measure.note)


def _pairs(
    records: Mapping[str, Sequence[Record]], attack: str
) -> Iterator[tuple[str, Record, Record]]:
    """Set-up, the record that holds the measures, and that of the attack, batch by batch."""
    for label, mine in records.items():
        setup, _, which = label.rpartition("/")
        if which == attack:
            first = next(other for other in records if other.rpartition("/")[0] == setup)
            measured = {(r.seed, r.batch): r for r in records[first]}
            for record in mine:
                if (record.seed, record.batch) in measured and record.scores is not None:
                    yield setup, measured[record.seed, record.batch], record


def _plain(rows: Sequence[Row]) -> Tensor:
    return torch.tensor([row[1:] for row in rows], dtype=torch.float64)


def _within(rows: Sequence[Row]) -> Tensor:
    """Ranks within their group, in [-1, 1]; groups whose measure is constant say nothing."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[0], []).append(row)
    kept = [_plain(group) for group in groups.values() if len({row[1] for row in group}) > 1]
    ranks = [2 * (_ranks(pairs, 0) - 1) / (len(pairs) - 1) - 1 for pairs in kept]
    return torch.cat(ranks) if ranks else torch.empty(0, 2, dtype=torch.float64)


def _ranks(pairs: Tensor, axis: int) -> Tensor:
    return torch.from_numpy(rankdata(pairs.numpy(), axis=axis))


def _spearman(pairs: Tensor) -> Tensor:
    """Of pairs ``(R, N, 2)``; 0 where one side is constant."""
    return _pearson(_ranks(pairs, 1))


def _pearson(pairs: Tensor) -> Tensor:
    a, b = (pairs - pairs.mean(1, keepdim=True)).unbind(-1)
    size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(size > 0, (a * b).sum(-1) / size.clamp(min=1e-300), torch.zeros_like(size))


def _figure(name: str, pairs: Tensor, rho: Callable[[Tensor], Tensor], note: str) -> dict[str, Any]:
    where = torch.arange(len(pairs), dtype=torch.float64)  # a pair stays together
    low, high = bootstrap(
        where, generator=stream(name), resamples=2_000,
        statistic=lambda picks: rho(pairs[picks.long()]),
    )  # fmt: skip
    value = float(rho(pairs[None])[0])
    return {
        "name": name, "value": value, "unit": "", "interval": (min(low, value), max(high, value)),
        "interval_by": "bootstrap", "n": len(pairs), "images": len(pairs), "note": note,
    }  # fmt: skip
