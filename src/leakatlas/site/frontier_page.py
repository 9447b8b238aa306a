"""Every defense at every strength on one chart: what is recovered, and what it costs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from leakatlas.catalogue import loader, tables
from leakatlas.catalogue.results import Measure, Result
from leakatlas.errors import UnknownName
from leakatlas.site.charts import Axis, Dot, Series, chart

STUDY = "frontier"
JOIN = " | "
LOSS = Axis("accuracy lost, points")
RECOVERED = Axis("images recovered, %")


@dataclass
class Row:
    """One defense on one network.

    Args:
        key: Of its row; ``none`` for the undefended set-up.
        name: For people.
        points: By strength: accuracy lost and share recovered.
        private: Least share recovered at an affordable price, if a strength has one.
        price: Least price at which next to nothing is recovered, if a strength does that.
    """

    key: str
    name: str
    points: dict[str, tuple[Measure, Measure]] = field(default_factory=dict)
    private: Measure | None = None
    price: Measure | None = None


def context(measured: Iterable[Result]) -> dict[str, Any]:
    """What the page is given: rows by network, the charts, and the same as data."""
    result = next((r for r in measured if (r.kind, r.key) == ("benchmark", STUDY)), None)
    if result is None:
        return {"result": None, "networks": {}, "charts": {}, "data": Markup("")}
    networks = _networks(result.measures)
    return {
        "result": result,
        "networks": networks,
        "charts": {name: _chart(name, rows) for name, rows in networks.items()},
        "data": _data(networks),
    }


def _networks(measures: Sequence[Measure]) -> dict[str, list[Row]]:
    """Rows by network, in the order of the study."""
    figures: dict[tuple[str, str, str], Measure] = {}
    for measure in measures:
        place = measure.name.split(JOIN)
        if len(place) == 3:
            figures[place[0], place[1], place[2]] = measure
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for (what, network, defense), recovered in figures.items():
        loss = figures.get(("loss", network, defense))
        if what == "recovered" and loss is not None:
            key, _, strength = defense.partition(", ")
            row = found[network].setdefault(key, Row(key, _name(key)))
            row.points[strength] = loss, recovered
            row.private = figures.get(("private", network, key))
            row.price = figures.get(("price", network, key))
    return {network: list(rows.values()) for network, rows in found.items()}


def _name(key: str) -> str:
    try:
        return tables.name_of(loader.defense(key))
    except UnknownName:  # the undefended set-up
        return "no defense" if key == "none" else key


def _chart(network: str, rows: Sequence[Row]) -> Markup:
    """For who has no script: one series, the labels under a pointer."""
    dots = tuple(
        Dot(loss.value, 100 * recovered.value, _words(row, strength, loss, recovered))
        for row in rows
        for strength, (loss, recovered) in row.points.items()
    )
    title = f"{network}: images recovered against accuracy lost"
    return chart(title, [Series("one strength of a defense", dots)], LOSS, RECOVERED)


def _words(row: Row, strength: str, loss: Measure, recovered: Measure) -> str:
    return (
        f"{row.name} {strength}: {100 * recovered.value:.0f} % recovered at "
        f"{loss.value:+.1f} points; {recovered.note}"
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
                        "y": 100 * recovered.value,
                        "words": _words(row, strength, loss, recovered),
                        "dominated": "dominated" in recovered.note,
                    }
                    for strength, (loss, recovered) in row.points.items()
                ],
            }
            for row in rows
        ]
        for network, rows in networks.items()
    }
    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
