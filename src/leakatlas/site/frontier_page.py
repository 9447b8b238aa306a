"""Every defense at every strength on one chart: what is recovered, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leakatlas.catalogue import frontier
from leakatlas.catalogue.frontier import Row, Strength
from leakatlas.catalogue.results import Measure, Result
from leakatlas.site.charts import Axis, Dot, Series, chart

LOSS = Axis("accuracy lost, points")
RECOVERED = Axis("images recovered, %")


def context(measured: Sequence[Result]) -> dict[str, Any]:
    """What the page is given: rows by network, the charts, the colours, and points as data."""
    result = frontier.result_of(measured)
    networks = {} if result is None else frontier.networks(result.measures)
    on_chart = {n: rows for n, rows in networks.items() if any(row.priced for row in rows)}
    return {
        "result": result,
        "networks": networks,
        "levels": {name: _levels(rows) for name, rows in networks.items()},
        "charts": {name: _chart(name, rows) for name, rows in on_chart.items()},
        "nulls": {
            name: frontier.in_words(found)
            for name, found in frontier.nulls(result.measures if result else ()).items()
        },
        "unpriced": frontier.UNPRICED,
        "took": frontier.run(result.measures if result else ()),
        "described": frontier.described(result.measures if result else ()),
        "undefended": frontier.undefended(result.measures if result else ()),
        "untried": frontier.untried(result.measures if result else ()),
        "unmeasured": frontier.unmeasured(result.measures if result else ()),
        "elsewhere": frontier.elsewhere(measured),
        "other_federations": frontier.OTHER_FEDERATIONS,
        "followed": frontier.followed,
        "accuracy": frontier.accuracy,
        "verdicts": frontier.verdicts(measured),
        "data": _data(on_chart),
    }


def _levels(rows: Sequence[Row]) -> list[str]:
    """The adversaries of a network, in the order of the study."""
    return list(dict.fromkeys(n for row in rows for p in row.points.values() for n in p.levels))


def _priced(row: Row) -> list[tuple[str, Strength, Measure]]:
    """The points that have a place on the chart."""
    return [(s, point, point.loss) for s, point in row.points.items() if point.loss is not None]


def _chart(network: str, rows: Sequence[Row]) -> Markup:
    """For who has no script: one series, the labels under a pointer."""
    dots = tuple(
        Dot(loss.value, 100 * point.recovered.value, _words(row, strength, point, loss))
        for row in rows
        for strength, point, loss in _priced(row)
    )
    title = f"{network}: images recovered against accuracy lost"
    return chart(title, [Series("one strength of a defense", dots)], LOSS, RECOVERED)


def _words(row: Row, strength: str, point: Strength, loss: Measure) -> str:
    return (
        f"{row.name} {strength}: {frontier.share(point.recovered)} images recovered at "
        f"{frontier.points(loss)} points; {point.recovered.note}"
    )


def _data(networks: dict[str, list[Row]]) -> Markup:
    """The points as JSON that is safe inside a script element."""
    values = {
        network: [
            {
                "name": row.name,
                "points": [
                    {
                        "x": loss.value,
                        "y": 100 * point.recovered.value,
                        "xs": loss.interval,
                        "ys": [100 * end for end in point.recovered.interval or ()] or None,
                        "words": _words(row, strength, point, loss),
                        "dominated": "dominated" in point.recovered.note,
                    }
                    for strength, point, loss in _priced(row)
                ],
            }
            for row in rows
        ]
        for network, rows in networks.items()
    }
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
