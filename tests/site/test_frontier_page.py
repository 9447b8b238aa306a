"""The page of the frontier: its tables, its data, and the chart that a script draws."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect

from leakatlas import site
from leakatlas.catalogue import frontier, results
from tests.site.conftest import Visit

PHONE = {"width": 390, "height": 800}


def test_headlines_name_the_strength_and_what_no_strength_gives(built: Path) -> None:
    page = (built / "frontier.html").read_text(encoding="utf-8").partition("fresh network</h2>")[2]
    (private,) = re.findall(r'client_dp\.html">.*?</tr>', page, re.DOTALL)
    assert "25 %" in private and "at client_dp, noise_multiplier=0.1" in private
    assert "+12.0" in private and "at client_dp, noise_multiplier=1" in private
    (scaled,) = re.findall(r'clipping\.html">.*?</tr>', page, re.DOTALL)
    assert "no strength costs so little" in scaled and "no strength stops so much" in scaled


def test_every_adversary_has_a_column_and_a_bound_does_not_count(built: Path) -> None:
    page = (built / "frontier.html").read_text(encoding="utf-8")
    assert "with its secret</th>" in page
    (strong,) = re.findall(r"<td>noise_multiplier=1</td>.*?</tr>", page, re.DOTALL)
    assert "75 %" in strong and strong.index("0 %") < strong.index("75 %")


def test_what_nobody_could_try_is_named_with_the_reason(built: Path) -> None:
    page = (built / "frontier.html").read_text(encoding="utf-8")
    assert "Nobody could try odd, k=1: no &lt;key&gt;" in page
    assert "Not measured, trap &lt;weights&gt;: 3 of 4 cells: odd, k=1 (3 of 4)" in page


def test_measured_colours_name_the_attack_and_the_setting(built: Path) -> None:
    page = (built / "frontier.html").read_text(encoding="utf-8")
    differs = "C: fails, 100% [40%, 100%] of 4 images: &lt;search&gt; (C, server) on fresh"
    assert differs in page  # printed: partial
    row = (built / "defenses" / "clipping.html").read_text(encoding="utf-8")
    assert "&lt;search&gt; (C, server) on fresh, at clipping, max_norm=1" in row


def test_what_a_result_says_is_escaped_twice_over(built: Path) -> None:
    page = (built / "frontier.html").read_text(encoding="utf-8")
    assert "<search>" not in page and "&lt;search&gt; recovered most" in page
    held = re.search(r'id="frontier-data">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    points = json.loads(held[1])["fresh"]
    assert any("<search>" in point["words"] for row in points for point in row["points"])


def test_without_a_measurement_the_page_says_how_to_make_one(tmp_path: Path) -> None:
    site.build(tmp_path / "site", results_folder=tmp_path / "none")
    page = (tmp_path / "site" / "frontier.html").read_text(encoding="utf-8")
    assert "Not measured yet" in page and "leakatlas bench frontier" in page


def test_prices_in_other_federations_stand_below(measured: Path, tmp_path: Path) -> None:
    """The undefended one first, escaped."""
    folder = tmp_path / "results"
    shutil.copytree(measured, folder)
    figures = [
        {"name": "accuracy", "case": case, "value": value, "interval": [0.4, 0.9], "n": 3}
        for case, value in (("many/<noise>", 0.5), ("many/none", 0.75))
    ]
    for name, value in (("half", 0.5), ("rounds_to_goal", 31.0), ("reached", 0.5), ("diverged", 0)):
        plain = {"name": name, "value": float(value), "interval": [value, value + 0.1], "n": 2}
        figures.append({**plain, "case": "many/none"})
    document = {
        "schema": "leakatlas/result/1", "kind": "benchmark", "key": "dp_many_users",
        "study": "dp_many_users", "code_version": 1, "hardware": "2 CPU cores",
        "seeds": [0], "measures": figures, "command": "leakatlas bench dp_many_users",
        "date": "2026-01-31", "recipe": {"study": "dp_many_users"},
    }  # fmt: skip
    (folder / "dp_many_users.json").write_text(json.dumps(document), encoding="utf-8")
    site.build(tmp_path / "site", results_folder=folder)
    page = (tmp_path / "site" / "frontier.html").read_text(encoding="utf-8")
    below = page.partition("Prices elsewhere")[2]
    none, noise = below.index('row">none<'), below.index("&lt;noise&gt;")
    assert none < below.index("75.0% [40.0%, 90.0%]") < noise < below.index("50.0% [40.0%")
    found = frontier.render(results.load(folder))
    way = "50.0% [50.0%, 60.0%] | 31 [31, 31], 50% missed it"
    assert found is not None and f"| none | 75.0% [40.0%, 90.0%] | {way} | 3 |" in found
    assert "| <noise> | 50.0% [40.0%, 90.0%] | - | - | 3 |" in found
    assert "Rounds to goal" in below and "31 [31, 31], 50% missed it" in below


def test_a_network_without_prices_has_no_chart_and_says_so(measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(measured, folder)
    document = json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    figures = document["measures" if "measures" in document else "summary"]
    figures += [
        {**figure, "name": figure["name"].replace("| fresh |", "| unpriced |")}
        for figure in figures
        if figure["name"].startswith("recovered | fresh |")
    ]
    (folder / "frontier.json").write_text(json.dumps(document), encoding="utf-8")
    site.build(tmp_path / "site", results_folder=folder)
    page = (tmp_path / "site" / "frontier.html").read_text(encoding="utf-8")
    section = page.partition("unpriced network</h2>")[2].partition("</section>")[0]
    assert frontier.UNPRICED in section and "<svg" not in section
    assert (
        frontier.UNPRICED not in page.partition("fresh network</h2>")[2].partition("</section>")[0]
    )
    held = re.search(r'id="frontier-data">(.*?)</script>', page, re.DOTALL)
    assert held is not None and "unpriced" not in json.loads(held[1])
    found = frontier.render(results.load(folder))
    assert found is not None and frontier.UNPRICED in found.partition("## unpriced")[2]


def test_the_chart_is_drawn_from_a_folder_and_follows_its_switches(visit: Visit) -> None:
    page = visit.open("frontier.html")
    expect(page.locator("#frontier")).to_be_visible()
    drawn = "Chart.getChart('frontier-chart').data.datasets.flatMap((d) => d.data).length"
    assert page.evaluate(drawn) == 4
    page.locator("#frontier-dominated").uncheck()
    assert page.evaluate(drawn) == 3
    page.locator("#frontier-intervals").check()
    page.locator("#frontier-defense").select_option(index=1)  # after "all": no defense
    assert page.evaluate(drawn) == 1
    expect(page.locator(".still").first).to_be_hidden()
    assert visit.complaints == []


@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
def test_a_long_name_among_the_choices_makes_no_phone_scroll_sideways(visit: Visit) -> None:
    page = visit.open("frontier.html")
    page.evaluate("document.getElementById('frontier-defense').add(new Option('w'.repeat(80)))")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
