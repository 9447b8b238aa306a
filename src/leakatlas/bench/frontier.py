"""Privacy against utility: one point for every defense and strength, and what they add up to.

An image counts as recovered if any adversary of its network recovered it, from the same victims and
seeds: the worst case, as a privacy officer must take it. The price is the accuracy lost beside the
same federation without a defense.

The figures are named ``what | network | defense``, so that a page can take them apart again:

==============  ============================================================================
recovered       share of images of which some adversary reaches 19 dB
loss            points of accuracy; the same for all networks of a study
private         per defense: least share recovered among strengths that cost 1 point at most
price           per defense: least loss among strengths that leave 5 % recovered at most
==============  ============================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leakatlas.bench.figures import Values, mean_and_interval
from leakatlas.bench.record import Record
from leakatlas.bench.study import Study
from leakatlas.metrics.intervals import binomial

SUCCESS = 19.0
"""PSNR in dB from which an image counts as recovered."""

AFFORDABLE = 1.0
"""Points of accuracy."""

PRIVATE = 0.05
"""Share of images recovered."""

UNDEFENDED = "none"
UTILITY = "utility"
JOIN = " | "


@dataclass(frozen=True)
class Point:
    """One defense at one strength, on one network.

    Args:
        network: Which.
        defense: Key and strength, as the axis says.
        recovered: Share of images, with its Wilson interval.
        images: How many.
        by: The adversary that recovered most.
        loss: Points of accuracy with their interval; None where it was not measured.
        noise: Whether noise of equal size leaves the searches less; None where it does not compare.
        dominated: Whether another costs no more and stops more.
    """

    network: str
    defense: str
    recovered: tuple[float, float, float]
    images: int
    by: str
    loss: tuple[float, float, float] | None
    noise: bool | None
    dominated: bool = False

    @property
    def key(self) -> str:
        """The defense's row."""
        return self.defense.partition(",")[0]


def points(records: Mapping[str, Sequence[Record]]) -> list[Point]:
    """Every point that has records, in the order of the study.

    Args:
        records: By case, named ``defense/network/adversary``.
    """
    losses = _losses(records)
    attacks: dict[tuple[str, str], dict[str, Sequence[Record]]] = defaultdict(dict)
    for label, mine in records.items():
        defense, network, adversary = label.split("/")
        if adversary != UTILITY and mine:
            attacks[network, defense][adversary] = mine
    found = [
        _point(network, defense, by_adversary, losses.get(defense))
        for (network, defense), by_adversary in attacks.items()
    ]
    return [
        Point(**{**vars(p), "dominated": any(_dominates(other, p) for other in found)})
        for p in found
    ]


Unit = tuple[int, int, int]
"""Seed, batch and place of an image."""


def _point(
    network: str,
    defense: str,
    attacks: Mapping[str, Sequence[Record]],
    loss: tuple[float, float, float] | None,
) -> Point:
    worst: dict[Unit, float] = {}
    totals: dict[str, float] = {}
    better: list[float] = []
    for adversary, mine in attacks.items():
        reached = dict(_reached(mine))
        totals[adversary] = sum(reached.values()) / max(len(reached), 1)
        for unit, psnr in reached.items():
            worst[unit] = max(worst.get(unit, psnr), psnr)
        for record in mine:
            control = _listed(record.own.get("psnr_equal_noise"))
            better += [a - b for a, b in zip(_psnr(record), control, strict=False)]
    # Seeds of one image are no images of their own, so the interval counts images.
    images = len({unit[1:] for unit in worst})
    share = sum(value >= SUCCESS for value in worst.values()) / len(worst)
    interval = binomial(round(share * images), images)
    return Point(
        network=network,
        defense=defense,
        recovered=(share, min(interval.low, share), max(interval.high, share)),
        images=images,
        by=max(totals, key=lambda name: totals[name]),
        loss=loss,
        noise=sum(better) > 0 if better else None,
    )


def _reached(records: Sequence[Record]) -> Iterator[tuple[Unit, float]]:
    for record in records:
        for place, psnr in enumerate(_psnr(record)):
            yield (record.seed, record.batch, place), psnr


def _psnr(record: Record) -> list[float]:
    """Of every image; one for which an attack that failed has no candidate is not recovered."""
    worst = _listed(record.own.get("psnr_worst"))
    if worst:
        return worst
    scores = record.scores
    images = () if scores is None else scores["images"]
    return [0.0 if image["candidate"] is None else float(image["psnr"]) for image in images]


def _listed(value: Any) -> list[float]:
    return list(value) if isinstance(value, list) else []


def _losses(records: Mapping[str, Sequence[Record]]) -> dict[str, tuple[float, float, float]]:
    """Points of accuracy by defense, over seeds, each beside the same seed without a defense."""
    by_defense: dict[str, dict[int, float]] = {}
    for label, mine in records.items():
        defense, _, adversary = label.split("/")
        if adversary == UTILITY:
            measured = {r.seed: float(r.own["accuracy"]) for r in mine if "accuracy" in r.own}
            by_defense[defense] = measured
    plain = by_defense.get(UNDEFENDED, {})
    found = {}
    for defense, measured in by_defense.items():
        seeds = sorted(measured.keys() & plain.keys())
        if seeds:
            paired: Values = {(s, ""): [100 * (plain[s] - measured[s])] for s in seeds}
            found[defense] = mean_and_interval(paired, "loss", defense)
    return found


def _dominates(one: Point, other: Point) -> bool:
    if one.network != other.network or one.loss is None or other.loss is None:
        return False
    mine, its = (one.loss[0], one.recovered[0]), (other.loss[0], other.recovered[0])
    return mine != its and mine[0] <= its[0] and mine[1] <= its[1]


def summarise(study: Study, records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """The figures of the frontier; see above."""
    del study
    every = points(records)
    for point in every:
        words = [f"{point.by} recovered most"]
        words += ["dominated"] if point.dominated else []
        words += ["no better than noise of equal size"] if point.noise else []
        yield _figure(
            ("recovered", point.network, point.defense), point.recovered, "", point.images,
            "; ".join(words), by="wilson",
        )  # fmt: skip
        if point.loss is not None:
            place = ("loss", point.network, point.defense)
            yield _figure(place, point.loss, "points", len(study_seeds(records)), "")
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in every:
        if point.loss is not None and point.defense != UNDEFENDED:
            groups[point.network, point.key].append(point)
    for (network, key), mine in groups.items():
        yield from _headlines(network, key, mine)


def study_seeds(records: Mapping[str, Sequence[Record]]) -> set[int]:
    """The seeds of all records."""
    return {record.seed for mine in records.values() for record in mine}


def _headlines(network: str, key: str, mine: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """Privacy at an affordable price, and the price of privacy, where a strength gives them."""
    cheap = [p for p in mine if p.loss is not None and p.loss[0] <= AFFORDABLE]
    if cheap:
        best = min(cheap, key=lambda p: p.recovered[0])
        yield _figure(
            ("private", network, key), best.recovered, "", best.images, f"at {best.defense}",
            by="wilson",
        )  # fmt: skip
    private = [p for p in mine if p.recovered[0] <= PRIVATE]
    if private:
        best = min(private, key=lambda p: p.loss or (0.0, 0.0, 0.0))
        assert best.loss is not None
        place = ("price", network, key)
        yield _figure(place, best.loss, "points", best.images, f"at {best.defense}")


def _figure(
    place: Sequence[str],
    value: tuple[float, float, float],
    unit: str,
    n: int,
    note: str,
    *,
    by: str = "bootstrap",
) -> dict[str, Any]:
    mean, low, high = value
    return {
        "name": JOIN.join(place), "value": mean, "unit": unit, "interval": [low, high],
        "interval_by": by, "n": n, "images": n, "note": note,
    }  # fmt: skip
