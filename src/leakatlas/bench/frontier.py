"""Privacy against utility: one point for every defense and strength, and what they add up to.

An image counts as recovered if any adversary of its network recovered it, from the same victim and
seed: the worst case, as a privacy officer must take it. Who holds a defense's secret is a bound,
which is shown and does not count. An adversary whose runs were refused or crashed has not tried
anything; that is said, and where nobody tried there is no point. The price is the accuracy lost
beside the same federation, with the same local training, without a defense. Where a network with
batch normalisation is attacked and none was trained under the defense, there is no price.

The figures are named ``what | network | defense``, so that a page can take them apart again:

==============  ============================================================================
recovered       share of images of which some adversary reaches 19 dB
level           the same for one adversary, whose name stands behind the defense
loss            points of accuracy
accuracy        ``accuracy | network | none``: percent, of the training without a defense
noise           dB that a search gains over one on noise of equal size instead
run             ``run | cells`` and ``run | CPU hours``: what has been run, and what that took
network         ``network | name``: how many images it was attacked on, and what it is
untried         how many runs were refused or crashed, where no adversary could try at all
unmeasured      ``unmeasured | network | adversary``: how many cells have no record yet
null            ``null | network | name``: dB of what an adversary without any update hands in
private         per defense: least share recovered among strengths that cost 1 point at most
price           per defense: least loss among strengths that leave 5 % recovered at most
colour          ``colour | letter | defense``: share recovered on the network that is worst for
                the defense at its published strength, by adversaries that know no more than
                the letter
==============  ============================================================================
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from leakatlas.bench.record import Record
from leakatlas.catalogue.results import JOIN
from leakatlas.fl import stream
from leakatlas.metrics.intervals import binomial, bootstrap
from leakatlas.threat import LETTERS, Grant

SUCCESS = 19.0
"""PSNR in dB from which an image counts as recovered."""

AFFORDABLE = 1.0
"""Points of accuracy."""

PRIVATE = 0.05
"""Share of images recovered."""

UNDEFENDED = "none"
UTILITY = "utility"
TRIED = ("complete", "cut short", "failed")
"""Ends of a run that say something of the defense."""

Range = tuple[float, float, float]
"""A value and its interval."""

Unit = tuple[int, int, int]
"""Seed, batch and place of an image."""

Federation = tuple[str, bool]
"""Of what a price is one: the algorithm, and whether the network has batch normalisation."""


@dataclass(frozen=True)
class Level:
    """What one adversary reached.

    Args:
        adversary: Its name in the study.
        letter: Of its threat model.
        vantage: Where it looks.
        reached: PSNR in dB by image.
        bound: Whether it holds the defense's secret, which no threat model gives.
    """

    adversary: str
    letter: str
    vantage: str
    reached: Mapping[Unit, float]
    bound: bool = False

    @property
    def share(self) -> float:
        """Of its images, those recovered."""
        return sum(value >= SUCCESS for value in self.reached.values()) / len(self.reached)


@dataclass(frozen=True)
class Point:
    """One defense at one strength, on one network.

    Args:
        network: Which.
        defense: Key and strength, as the axis says.
        recovered: Share of images, with its Wilson interval.
        images: How many.
        levels: What each adversary reached.
        by: The adversary that recovered most.
        loss: Points of accuracy with their interval; None where it was not measured.
        noise: DB gained over noise of equal size, with its interval; None where nothing compares.
        remarks: What a reader must know: who was refused.
        dominated: Whether another costs no more and stops more.
    """

    network: str
    defense: str
    recovered: Range
    images: int
    levels: tuple[Level, ...]
    by: str
    loss: Range | None
    noise: Range | None
    remarks: tuple[str, ...] = ()
    dominated: bool = False

    @property
    def key(self) -> str:
        """The defense's row."""
        return self.defense.partition(",")[0]


def points(records: Mapping[str, Sequence[Record]]) -> list[Point]:
    """Every point that somebody has tried, in the order of the study.

    Args:
        records: By case, named ``defense/network/adversary``.
    """
    losses = _losses(records)
    found = [
        point
        for (network, defense), by_adversary in _attacks(records).items()
        if (point := _point(network, defense, by_adversary, losses)) is not None
    ]
    return [replace(p, dominated=any(_dominates(other, p) for other in found)) for p in found]


def _attacks(
    records: Mapping[str, Sequence[Record]],
) -> dict[tuple[str, str], dict[str, Sequence[Record]]]:
    """By network and defense, the records of every adversary."""
    attacks: dict[tuple[str, str], dict[str, Sequence[Record]]] = defaultdict(dict)
    for label, mine in records.items():
        defense, network, adversary = label.split("/")
        if adversary != UTILITY and mine:
            attacks[network, defense][adversary] = mine
    return attacks


def _point(
    network: str,
    defense: str,
    attacks: Mapping[str, Sequence[Record]],
    losses: Mapping[tuple[str, Federation], Range],
) -> Point | None:
    levels: list[Level] = []
    remarks: list[str] = []
    gained: dict[Unit, float] = {}
    federation: Federation = ("", False)
    for adversary, mine in attacks.items():
        ran = [record for record in mine if record.status in TRIED]
        remarks += _untried(adversary, mine)
        if not ran:
            continue
        case: Mapping[str, Any] = ran[0].recipe.get("case", {})
        federation = _federation(ran[0])
        level = Level(
            adversary,
            str(case.get("letter", "C")),
            str(case.get("vantage", "server")),
            dict(_reached(ran)),
            bound=Grant.DEFENSE_SECRETS in case.get("grants", ()),
        )
        levels.append(level)
        for record in ran:
            control = _listed(record.own.get("psnr_equal_noise"))
            pairs = zip(_psnr(record), control, strict=False)
            gained |= {
                (record.seed, record.batch, place): a - b for place, (a, b) in enumerate(pairs)
            }
    counted = [level for level in levels if not level.bound]
    if not counted:
        return None
    recovered, images = _together(counted)
    return Point(
        network=network,
        defense=defense,
        recovered=recovered,
        images=images,
        levels=tuple(levels),
        by=max(counted, key=lambda level: (level.share, _mean(level.reached))).adversary,
        loss=losses.get((defense, federation)),
        noise=_interval(gained, "noise", defense, network) if gained else None,
        remarks=tuple(remarks),
    )


def _untried(adversary: str, records: Sequence[Record]) -> Iterator[str]:
    ends = Counter(record.status for record in records if record.status not in TRIED)
    for status, count in ends.items():
        yield f"{adversary}: {count} of {len(records)} {status}"


def _together(levels: Sequence[Level]) -> tuple[Range, int]:
    """Share of images that somebody recovered, its interval, and how many images there are."""
    best: dict[Unit, float] = {}
    for level in levels:
        for unit, value in level.reached.items():
            best[unit] = max(best.get(unit, value), value)
    # Seeds of one image are no images of their own, so the interval counts images.
    images = len({unit[1:] for unit in best})
    share = sum(value >= SUCCESS for value in best.values()) / len(best)
    interval = binomial(round(share * images), images)
    return (share, min(interval.low, share), max(interval.high, share)), images


def _mean(values: Mapping[Unit, float]) -> float:
    return sum(values.values()) / len(values)


def _interval(values: Mapping[Unit, float], *keys: str) -> Range:
    """Mean and bootstrap interval; seeds of one image move together."""
    by_image: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (_, batch, place), value in values.items():
        by_image[batch, place].append(value)
    return _bootstrapped([sum(several) / len(several) for several in by_image.values()], *keys)


def _bootstrapped(values: Sequence[float], *keys: str) -> Range:
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap(tensor, generator=stream("frontier", *keys))
    mean = float(tensor.mean())
    return mean, min(low, mean), max(high, mean)


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


def _federation(record: Record) -> Federation:
    case = record.recipe.get("case", {})
    normed = case.get("model", {}).get("kwargs", {}).get("norm") == "batch"
    return str(case.get("protocol", {}).get("algorithm", "fedsgd")), normed


def _losses(records: Mapping[str, Sequence[Record]]) -> dict[tuple[str, Federation], Range]:
    """Points of accuracy by defense and federation, each seed beside itself without a defense."""
    measured: dict[tuple[str, Federation], dict[int, float]] = defaultdict(dict)
    for label, mine in records.items():
        defense, _, adversary = label.split("/")
        for record in mine if adversary == UTILITY else ():
            if "accuracy" in record.own:
                place = defense, _federation(record)
                measured[place][record.seed] = float(record.own["accuracy"])
    found = {}
    for (defense, federation), accuracies in measured.items():
        plain = measured.get((UNDEFENDED, federation), {})
        seeds = sorted(accuracies.keys() & plain.keys())
        if seeds:
            lost = [100 * (plain[seed] - accuracies[seed]) for seed in seeds]
            found[defense, federation] = _bootstrapped(lost, "loss", defense, federation[0])
    return found


def _dominates(one: Point, other: Point) -> bool:
    if one.network != other.network or one.loss is None or other.loss is None:
        return False
    mine, its = (one.loss[0], one.recovered[0]), (other.loss[0], other.recovered[0])
    return mine != its and mine[0] <= its[0] and mine[1] <= its[1]


def summarise(
    records: Mapping[str, Sequence[Record]],
    published: Mapping[str, str],
    cells: Mapping[str, int],
) -> Iterator[dict[str, Any]]:
    """The figures of the frontier; see above.

    Args:
        records: By case.
        published: By key of a defense, the value of the axis that is its published strength.
        cells: How many every case has, run or not.
    """
    every = points(records)
    seeds = len({r.seed for label, m in records.items() if label.endswith(UTILITY) for r in m})
    for point in every:
        yield from _of_point(point, seeds)
    yield from _run(records, cells)
    yield from _described(records)
    yield from _untouched(records, every)
    yield from _unmeasured(records, cells)
    yield from _undefended(records)
    yield from _nulls(records)
    groups: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in every:
        if point.loss is not None and point.defense != UNDEFENDED:
            groups[point.network, point.key].append(point)
    for (network, key), mine in groups.items():
        yield from _headlines(network, key, mine)
    for key, strength in published.items():
        yield from _colours(key, [point for point in every if point.defense == strength])


def _of_point(point: Point, seeds: int) -> Iterator[dict[str, Any]]:
    words = [f"{point.by} recovered most"] if point.recovered[0] else []
    words += ["dominated"] if point.dominated else []
    if point.noise is not None:
        words += ["no better than noise of equal size"] if point.noise[2] >= 0 else []
    place = (point.network, point.defense)
    yield _figure(
        ("recovered", *place), point.recovered, "", point.images,
        "; ".join((*words, *point.remarks)), by="wilson",
    )  # fmt: skip
    for level in point.levels:
        share, images = _together([level])
        note = f"{level.letter}, {level.vantage}" + ("; a bound" if level.bound else "")
        yield _figure(("level", *place, level.adversary), share, "", images, note, by="wilson")
    if point.noise is not None:
        yield _figure(("noise", *place), point.noise, "dB", point.images, "over equal noise")
    if point.loss is not None:
        yield _figure(("loss", *place), point.loss, "points", seeds, "")


def _run(
    records: Mapping[str, Sequence[Record]], cells: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    ran = [record for mine in records.values() for record in mine]
    if ran:
        n, planned = float(len(ran)), sum(cells.values())
        yield _figure(("run", "cells"), (n, n, n), "cells", len(ran), f"of {planned}")
        hours = sum(record.costs.get("cpu_seconds", 0.0) for record in ran) / 3600
        yield _figure(
            ("run", "CPU hours"),
            (hours, hours, hours),
            "h",
            len(ran),
            "inside attacks and trainings",
        )


def _described(records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """What every network is, and how many images it was attacked on."""
    found: dict[str, tuple[Mapping[str, Any], set[tuple[int, int]]]] = {}
    for (network, _), by_adversary in _attacks(records).items():
        for record in (r for mine in by_adversary.values() for r in mine):
            case = record.recipe.get("case", {})
            if "model" in case:
                _, images = found.setdefault(network, (case, set()))
                images |= {(record.seed, record.batch)}
    for network, (case, images) in found.items():
        n = float(len(images))
        yield _figure(("network", network), (n, n, n), "batches", len(images), _words(case))


def _words(case: Mapping[str, Any]) -> str:
    model, protocol, batch = case["model"], case["protocol"], case["batch"]
    settings = ", ".join(f"{k} {v}" for k, v in model["kwargs"].items())
    told = model["train"]
    weights = model["weights"] or "fresh weights"
    if told:
        weights = f"{told['epochs']} epochs on {told['images']['count']} public images"
    local = "one gradient a round (FedSGD)"
    if protocol["algorithm"] != "fedsgd":
        local = f"local epochs a round: {protocol.get('epochs', 1)} (FedAVG)"
    images = f"{batch} image{'s' * (batch > 1)} a client of {case['victims']['set']}"
    return f"{model['builtin']} ({settings}), {weights}; {local}, {images}"


def _untouched(
    records: Mapping[str, Sequence[Record]], every: Sequence[Point]
) -> Iterator[dict[str, Any]]:
    """Where nobody could try: nothing can be said of it, and that is said."""
    tried = {(point.network, point.defense) for point in every}
    for place, by_adversary in _attacks(records).items():
        ends = [record for mine in by_adversary.values() for record in mine]
        if place not in tried:
            n = float(len(ends))
            yield _figure(("untried", *place), (n, n, n), "runs", len(ends), ends[0].reason)


def _unmeasured(
    records: Mapping[str, Sequence[Record]], cells: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """What has no record yet, by network and adversary, and which defenses that concerns."""
    planned: Counter[tuple[str, str]] = Counter()
    missing: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for label, many in cells.items():
        defense, network, adversary = label.split("/")
        planned[network, adversary] += many
        lacks = many - len(records.get(label, ()))
        if lacks:
            missing[network, adversary][f"{defense} ({lacks} of {many})"] = lacks
    for place, lacking in missing.items():
        n = float(sum(lacking.values()))
        words = "; ".join(lacking)
        yield _figure(("unmeasured", *place), (n, n, n), "cells", planned[place], words)


def _undefended(records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """What all prices are held against, and how far seeds move it."""
    for label, mine in records.items():
        defense, network, adversary = label.split("/")
        reached = [100 * float(r.own["accuracy"]) for r in mine if "accuracy" in r.own]
        if (defense, adversary) == (UNDEFENDED, UTILITY) and reached:
            place = ("accuracy", network, UNDEFENDED)
            note = "seeds reach " + ", ".join(f"{value:.1f}" for value in reached)
            yield _figure(place, _bootstrapped(reached, *place), "%", len(reached), note)


def _nulls(records: Mapping[str, Sequence[Record]]) -> Iterator[dict[str, Any]]:
    """Null baselines of the undefended victims of every network."""
    found: dict[tuple[str, str], dict[Unit, float]] = defaultdict(dict)
    for label, mine in records.items():
        defense, network, _ = label.split("/")
        for record in mine if defense == UNDEFENDED else ():
            for name, baseline in (record.scores or {"baselines": {}})["baselines"].items():
                found[network, name][record.seed, record.batch, 0] = float(baseline["psnr"])
    for (network, name), values in found.items():
        place, n = ("null", network, name), len({unit[1:] for unit in values})
        yield _figure(place, _interval(values, *place), "dB", n, "without any update")


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


def _colours(key: str, mine: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """What every letter recovers on the network that is worst for the defense."""
    for letter, model in LETTERS.items():
        worst: tuple[Range, int, Point, Level] | None = None
        for point in mine:
            able = [
                level
                for level in point.levels
                if not level.bound and LETTERS[level.letter].knowledge in model.knowledge
            ]
            if able:
                share, images = _together(able)
                if worst is None or share[0] > worst[0][0]:
                    best = max(able, key=lambda level: (level.share, _mean(level.reached)))
                    worst = share, images, point, best
        if worst is not None:
            share, images, point, best = worst
            note = f"{best.adversary} ({best.letter}, {best.vantage}) on {point.network}"
            note += f", at {point.defense}"
            if point.loss is not None:
                note += f", which costs {point.loss[0]:+.1f} points of accuracy"
            yield _figure(("colour", letter, key), share, "", images, note, by="wilson")


def _figure(
    place: Sequence[str],
    value: Range,
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
