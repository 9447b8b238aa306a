"""The first page of a report on paper, in a real browser."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from leakatlas.report import Comparison, Context, Report, write_report
from tests.report.test_write import report  # noqa: F401  # a fixture

ACROSS, DOWN = 703, 1039
"""CSS pixels of A4 less the margins of the print style."""


@pytest.fixture
def full(report: Report, tmp_path: Path) -> Path:  # noqa: F811
    """A report with all eight letters, a context and a comparison."""
    context = Context(
        purpose="Training a classifier of photographs across three clinics",
        controllers=("Clinic A", "Clinic B", "Clinic C"),
        processors=("Aggregator Ltd.",),
        data=("photographs", "diagnoses"),
        people=("patients",),
        special_categories=True,
        people_per_update=4,
        adversaries={"C": "our aggregator", "G": "the same, if its server were taken over"},
        assessor="J. Doe, data protection officer",
    )
    late = "the budget ended before its price was measured"
    alternatives = (
        *(Comparison(f"defense {i}", (), report.runs, 0.9) for i in range(3)),
        Comparison("defense 3", (), report.runs, None, late),
    )
    letters = tuple("ABCDEFGH")
    return write_report(
        replace(report, context=context, letters=letters, comparisons=alternatives), tmp_path
    )


def test_the_summary_is_one_page(chromium: Browser, full: Path) -> None:
    sheet = chromium.new_page(viewport={"width": ACROSS, "height": DOWN})
    sheet.emulate_media(media="print")
    sheet.goto(full.as_uri())
    bottom = sheet.evaluate("document.querySelector('.summary').getBoundingClientRect().bottom")
    across = sheet.evaluate("document.documentElement.scrollWidth")
    sheet.close()
    assert 0 < bottom < DOWN
    assert across <= ACROSS


@pytest.mark.parametrize("width", [390, 1200])
def test_a_report_never_scrolls_sideways(chromium: Browser, full: Path, width: int) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900})
    page.goto(full.as_uri())
    across = page.evaluate("document.documentElement.scrollWidth")
    cut = page.evaluate("""[...document.querySelectorAll('.stack')]
        .filter(table => table.scrollWidth > table.parentElement.clientWidth).length""")
    page.close()
    assert across <= width
    assert cut == 0, "a table of stacked rows has nothing beyond its edge"


def test_what_is_folded_on_a_screen_is_printed(chromium: Browser, full: Path) -> None:
    page = chromium.new_page()
    page.goto(full.as_uri())
    hidden = page.evaluate("document.querySelector('.runs').checkVisibility()")
    page.emulate_media(media="print")
    printed = page.evaluate("document.querySelector('.runs').checkVisibility()")
    page.close()
    assert (hidden, printed) == (False, True)
