"""The one measured figure that stands for a row in a list, and the curve behind a defense."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leakatlas.catalogue import results, source
from leakatlas.catalogue.results import Measure, Result

# Figures that are held against the attack's own, and are none of it.
_BESIDE = re.compile(r"null|baseline|grey|gray|mean image|minus|paired|control|other batch", re.I)
_AT_KNOB = re.compile(r"^(?P<what>.*) \[(?P<knob>\w+)=(?P<value>[^\]]+)\]$")
_AT_CASE = re.compile(r"^\w+, (?P<knob>\w+)=(?P<value>[^/]+)/(?P<who>.+)$")
"""Cases of the study of defenses."""
_ACCURACY = "test accuracy"
_PSNR = {
    "PSNR, oblivious attack": "ignores the defense",
    "PSNR, adaptive attack": "knows the defense",
    "PSNR, worst attack per victim": "worst for each victim",
}
"""Curves of a defense: the measure, and what its adversary does."""


_STUDIED = {
    ("utility", "accuracy"): (_ACCURACY,),
    ("oblivious", "psnr"): ("PSNR, oblivious attack",),
    ("adaptive", "psnr_worst"): ("PSNR, adaptive attack", "PSNR, worst attack per victim"),
}
"""What the figures of that study, by adversary and name, are called here."""


@dataclass(frozen=True)
class Headline:
    """The figure of a row.

    Args:
        measure: The figure, with its interval and count.
        what: What it is, in words.
        stale: Whether the code has moved on since.
    """

    measure: Measure
    what: str
    stale: bool


def of_attack(measured: Sequence[Result], key: str) -> Headline | None:
    """The best mean PSNR in any setting; without one, the first share, or the first figure at all.

    Fresh results come before stale ones, figures with an interval before single trials. Null
    baselines and differences do not stand for a row.
    """
    mine = sorted(results.of_row(tuple(measured), "attack", key), key=lambda result: result.stale)
    for stale in (False, True):
        own = [
            measure
            for result in mine
            for measure in result.measures
            if result.stale == stale and not _BESIDE.search(measure.name)
        ]
        if own:
            best = _best(own)
            return Headline(best, ", ".join(filter(None, (best.name, best.case))), stale)
    return None


def _best(figures: Sequence[Measure]) -> Measure:
    decibels = [m for m in figures if m.unit == "dB" and m.name.casefold().startswith("psnr")]
    repeated = [measure for measure in decibels if measure.interval is not None]
    if decibels:
        return max(repeated or decibels, key=lambda measure: measure.value)
    return next((measure for measure in figures if measure.unit == "share"), figures[0])


@dataclass(frozen=True)
class Point:
    """A defense at one strength.

    Args:
        knob: Value of the privacy knob, as the study writes it.
        accuracy: Test accuracy in percent.
        psnr: Mean PSNR in dB by adversary, in the words of the chart.
    """

    knob: str
    accuracy: Measure
    psnr: dict[str, Measure]


def curve(measured: Sequence[Result], key: str) -> tuple[str, tuple[Point, ...], bool]:
    """The name of a defense's knob, its measured strengths in the study's order, and staleness.

    Only strengths with an accuracy and at least one attack are points.
    """
    found: dict[str, dict[str, Measure]] = {}
    knob, stale = "", False
    mine = results.of_row(tuple(measured), "defense", key)
    # What a study measured replaces what was carried over.
    for result in sorted(mine, key=lambda result: not result.carried_over):
        for measure in result.measures:
            for named, names in _named(measure):
                knob, stale = named["knob"], stale or result.stale
                found.setdefault(named["value"], {}).update(dict.fromkeys(names, measure))
    points = (
        Point(value, figures[_ACCURACY], _attacks(figures))
        for value, figures in found.items()
        if _ACCURACY in figures
    )
    return knob, tuple(point for point in points if point.psnr), stale


def _named(measure: Measure) -> Iterable[tuple[re.Match[str], tuple[str, ...]]]:
    """Where a figure of a defense says its strength, and what it is called here."""
    if (named := _AT_KNOB.match(measure.name)) is not None:
        yield named, (named["what"],)
    if (named := _AT_CASE.match(measure.case)) is not None:
        who = named["who"].partition(",")[0]
        if (who, measure.name) in _STUDIED:
            yield named, _STUDIED[who, measure.name]


def _attacks(figures: dict[str, Measure]) -> dict[str, Measure]:
    return {words: figures[name] for name, words in _PSNR.items() if name in figures}


def of_defense(measured: Sequence[Result], key: str) -> Headline | None:
    """What the worst attack still reaches at the default strength, and the accuracy there.

    Where the default was not measured, the first strength above neutral stands for it.
    """
    knob, points, stale = curve(measured, key)
    worst = _PSNR["PSNR, worst attack per victim"]
    points = tuple(point for point in points if worst in point.psnr)
    default = _default(key, knob)
    at_default = [point for point in points if _close(_number(point.knob), default)]
    if not at_default and len(points) < 2:
        return None
    point = at_default[0] if at_default else points[1]
    words = f"worst attack at {knob} = {point.knob}, test accuracy {point.accuracy.value:.0%}"
    return Headline(point.psnr[worst], words, stale)


def _default(key: str, knob: str) -> float | None:
    found = source.of("defense", key)
    defaults: Iterable[str] = (
        () if found is None else (p.default for p in found.parameters if p.name == knob)
    )
    return next((_number(default) for default in defaults), None)


def _close(a: float | None, b: float | None) -> bool:
    """Equal to the three digits that studies write."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-3)


def _number(text: str) -> float | None:
    """A number as studies and modules write it (``0.4``, ``1e-3``, ``2 / 3``), else None."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Div):
        above, below = (_number(ast.unparse(side)) for side in (tree.left, tree.right))
        return above / below if above is not None and below else None
    return None
