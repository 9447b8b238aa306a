"""Charts as text: places, ticks, names, and nothing that a page forbids."""

import re
from xml.etree import ElementTree

import pytest

from leakatlas.site.charts import Axis, Dot, Series, _Scale, chart

LINE = Series("ours <1>", (Dot(1, 10, "a"), Dot(10, 20, "b & c", "k", 18, 22), Dot(100, 15, "d")))


def drawn(*series: Series, log: bool = True) -> ElementTree.Element:
    return ElementTree.fromstring(
        str(chart("PSNR & time", series, Axis("seconds", log), Axis("dB")))
    )


def test_it_is_well_formed_named_and_escaped() -> None:
    figure = drawn(LINE)
    svg = figure.find("svg")
    assert svg is not None and svg.get("aria-label") == "PSNR & time" and svg.get("role") == "img"
    assert [item.text or item[0].tail for item in figure.iter("li")] == ["ours <1>"]
    assert [title.text for title in figure.iter("title")] == ["a", "b & c", "d"]
    assert not any("style" in node.attrib for node in figure.iter())


def test_equal_factors_are_equal_lengths_on_a_logarithmic_axis() -> None:
    xs = [float(node.get("cx", 0)) for node in drawn(LINE).iter("circle")][:3]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    plain = [float(node.get("cx", 0)) for node in drawn(LINE, log=False).iter("circle")][:3]
    assert plain[2] - plain[1] > 5 * (plain[1] - plain[0])


def test_higher_values_stand_higher_and_everything_is_inside() -> None:
    figure = drawn(LINE)
    ys = [float(node.get("cy", 0)) for node in figure.iter("circle")][:3]
    assert ys[1] < ys[2] < ys[0]
    numbers = [
        float(n) for n in re.findall(r"[MLVH]([\d.]+)", ElementTree.tostring(figure).decode())
    ]
    assert all(0 <= number <= 420 for number in numbers)


def test_series_differ_by_marker_too() -> None:
    first, second = drawn(LINE, Series("other", LINE.dots)).iter("ul").__next__()
    assert [child.tag for child in first[0]] != [child.tag for child in second[0]]


def test_only_the_end_of_an_unmarked_series_has_a_marker() -> None:
    figure = drawn(Series("long", LINE.dots, marked=False))
    assert [title.text for title in figure.iter("title")] == ["d"]


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.0, 10.0, False, [0, 2, 4, 6, 8, 10]),
        (92.6, 94.1, False, [93.0, 93.5, 94.0]),
        (1.0, 1000.0, True, [1, 10, 100, 1000]),
        (3.0, 30.0, True, [5, 10, 20]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, ticks: list[float]) -> None:
    found = _Scale([low, high], 0, 100, log).ticks()
    assert found == pytest.approx(ticks)


def test_one_point_and_equal_points_have_a_place() -> None:
    figure = drawn(Series("flat", (Dot(1, 5, "a"), Dot(1, 5, "b"))), log=False)
    assert all(0 < float(node.get("cy", 0)) < 280 for node in list(figure.iter("circle"))[:2])


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="has no point"):
        chart("empty", [], Axis("x"), Axis("y"))
