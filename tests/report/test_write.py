"""The page: escaped, self-contained, and consistent with the JSON beside it."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from leakatlas import data
from leakatlas.audit import Plan, Report, Setting, carry_out
from leakatlas.data import Box
from leakatlas.fl import FedSGD, ModelRef
from leakatlas.report import render_page, write_report
from leakatlas.report.schema import ReportFile, report_schema
from leakatlas.report.write import ORDERED

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def report() -> Report:
    reference = ModelRef("builtin", "fc", {"in_channels": 3, "size": 32, "classes": 8,
                                           "widths": [16]})  # fmt: skip
    setting = Setting(
        name=EVIL,
        model=reference.build(),
        model_ref=reference,
        victims=data.photos(32).subset([0]),
        protocol=FedSGD(),
        box=Box.unit(3),
        surrogate=data.patches(32, 32, part="surrogate"),
        attacks=("inverting_gradients", "robbing_the_fed", "rgap"),
    )
    return carry_out(
        Plan(
            settings=(setting,),
            letters=("A", "B", "G"),
            attack_parameters={"inverting_gradients": {"steps": 3}},
            seconds=600.0,  # more than it needs on any machine
            command=f"leakatlas audit '{EVIL}'",
            source={"model": EVIL},
        )
    )


class Links(HTMLParser):
    """Collects every reference that a browser would follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


def test_every_string_is_escaped(report: Report) -> None:
    page = render_page(report)
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    parser = Links()
    parser.feed(page)
    assert "script" not in parser.tags


def test_the_page_refers_to_nothing_outside(report: Report) -> None:
    parser = Links()
    parser.feed(render_page(report))
    assert parser.found and all(link.startswith("data:image/png;base64,") for link in parser.found)


def test_pictures_have_words(report: Report) -> None:
    page = render_page(report)
    assert page.count("<img") == len(re.findall(r'<img[^>]* alt="[^"]+"', page)) > 0


def test_page_and_json_agree(report: Report, tmp_path: Path) -> None:
    page = write_report(report, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "report.json").read_text())
    assert page.name == "report.html"
    assert {v["letter"]: v["verdict"] for v in values["verdicts"]}["G"] == "exact leak"
    assert page.read_text().count('class="letter"') == 3
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_the_json_fits_its_schema(report: Report) -> None:
    values = report.to_json()
    TypeAdapter(ReportFile).validate_python({"schema_": values.pop("schema"), **values})
    schema = report_schema()
    assert set(schema["required"]) == {"schema", *values}


def test_a_report_without_images_is_a_page(report: Report) -> None:
    empty = replace(report, runs=(), comparisons=(), diagnoses={})
    page = render_page(empty)
    assert "No attack returned an image" in page and "no attack was tried" in page


def test_an_interrupted_audit_says_so(report: Report) -> None:
    assert "stopped early" in render_page(replace(report, complete=False))
    assert "stopped early" not in render_page(report)


def test_the_page_shows_what_was_measured_before_any_attack(report: Report) -> None:
    page = html.unescape(render_page(report))
    measures = report.to_json()["diagnoses"][EVIL]["measures"]
    assert {m["name"] for m in measures} >= {"label_exposure", "constraints_per_unknown"}
    for measure in measures:
        assert measure["title"] in page and f"<small>{measure['name']}</small>" in page
    assert "measures taken before any attack" in page and "spectrum are left out" in page
    assert "not defined" in page  # an imbalance of one image


def test_how_attacks_were_ordered_is_said_where_any_was_rehearsed(report: Report) -> None:
    def page(rehearsal: dict[str, object]) -> str:
        runs = (replace(r, recipe={**r.recipe, "rehearsal": rehearsal}) for r in report.runs)
        return html.unescape(render_page(replace(report, runs=tuple(runs))))

    assert ORDERED not in page({})
    assert ORDERED in page({"refused": "no time"})
