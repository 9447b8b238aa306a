"""What was measured, as charts: quality against time, and privacy against utility."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from leakatlas.catalogue import headline
from leakatlas.catalogue.results import Measure, Result
from leakatlas.catalogue.schema import Defense
from leakatlas.site.charts import Axis, Dot, Series, chart

SECONDS = Axis("CPU seconds", logarithmic=True)
DECIBELS = Axis("PSNR, dB")
ACCURACY = Axis("test accuracy, %")


def context(measured: Sequence[Result], defenses: Iterable[Defense]) -> dict[str, Any]:
    """What the page of charts is given."""
    curves = [(row, drawn) for row in defenses if (drawn := defense_chart(measured, row))]
    return {"timed": timed(r for r in measured if r.kind != "defense"), "curves": curves}


def timed(measured: Iterable[Result]) -> list[dict[str, Any]]:
    """The charts of every result that kept the quality of its iterates over time."""
    found = []
    for result in measured:
        cases = result.recipe.get("curves")
        if cases and isinstance(cases, Mapping):
            drawn = [(case, _time_chart(case, presets)) for case, presets in cases.items()]
            found.append({"result": result, "cases": drawn})
    return found


def _time_chart(case: str, presets: Mapping[str, Mapping[str, Sequence[float]]]) -> Markup:
    series = [
        Series(
            name,
            tuple(
                Dot(seconds, psnr, f"{name}: {psnr:.1f} dB after {seconds:.3g} s")
                for seconds, psnr in zip(held["seconds"], held["psnr"], strict=True)
                if seconds > 0
            ),
            marked=False,
        )
        for name, held in presets.items()
    ]
    title = ": ".join(filter(None, (case, "PSNR of the best iterate against time")))
    return chart(title, series, SECONDS, DECIBELS)


def defense_chart(measured: Sequence[Result], row: Defense) -> Markup | None:
    """Accuracy against what attacks reach, over the strengths of a defense; None if unmeasured."""
    knob, points, _ = headline.curve(measured, row.key)
    names = list(dict.fromkeys(name for point in points for name in point.psnr))
    if len(points) < 2:
        return None
    series = [
        Series(name, tuple(_dot(knob, point, name) for point in points if name in point.psnr))
        for name in names
    ]
    title = f"{row.name}: PSNR that attacks reach against test accuracy, by {knob}"
    return chart(title, series, ACCURACY, DECIBELS)


def _dot(knob: str, point: headline.Point, name: str) -> Dot:
    figure: Measure = point.psnr[name]
    low, high = figure.interval or (None, None)
    percent = 100 * point.accuracy.value
    words = f"{name}, {knob} = {point.knob}: {figure.value:.1f} dB at {percent:.1f} % accuracy"
    return Dot(percent, figure.value, words, label=point.knob, low=low, high=high)
