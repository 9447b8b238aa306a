"""The printed mode gives back the published tables, cell for cell."""

import json
from pathlib import Path
from typing import Any

import pytest

from leakatlas.catalogue import export, tables

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "published_tables.json").read_text(encoding="utf-8")
)
TABLES = ("threat_models", "attacks", "defenses")


@pytest.fixture(scope="module")
def exported() -> dict[str, list[dict[str, Any]]]:
    """What is in print; rows that were added have nothing under ``printed``."""
    everything = export.export()
    return {
        name: [row for row in rows if row["printed"] is not None]
        for name, rows in everything.items()
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_printed_fact_cell_is_the_published_one(
    name: str, exported: dict[str, list[dict[str, Any]]]
) -> None:
    for published, row in zip(PUBLISHED[name], exported[name], strict=True):
        assert published == {column: row["printed"][column] for column in published}


def test_every_reference_is_printed_with_its_links(
    exported: dict[str, list[dict[str, Any]]],
) -> None:
    assert {str(row["number"]): row["printed"] for row in exported["references"]} == PUBLISHED[
        "references"
    ]


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in TABLES])
def test_the_markdown_table_holds_the_published_cells(name: str) -> None:
    lines = tables.render(tables.table(name, "printed"), "markdown").splitlines()
    published = PUBLISHED[name.replace("-", "_")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = [line for line in lines[2:] if line.startswith("| ")]
    for row, line in zip(published, rows, strict=True):
        cells = dict(zip(header, (c.strip() for c in line.strip("|").split("|")), strict=True))
        assert row == {column: cells[column] for column in row}


def test_corrections_keep_both_values(exported: dict[str, list[dict[str, Any]]]) -> None:
    by_key = {row["key"]: row for row in (*exported["attacks"], *exported["defenses"])}
    label = by_key["dlfa"]
    assert label["printed"]["Label Recovery"].startswith("[link]")
    assert label["corrected"]["Label Recovery"] == "🆕"
    assert by_key["secure_aggregation"]["printed"]["Work"] == "[40]"
    assert by_key["secure_aggregation"]["corrected"]["Work"] == "[40,41]"
    assert by_key["homomorphic_encryption"]["corrected"]["Work"] == "[40]"
    for key in ("hcgla", "mjolnir", "fgla", "fishing", "outpost", "fl_gradinv"):
        assert by_key[key]["printed"]["Open Source"] == "✗"
        assert "github.com" in by_key[key]["corrected"]["Open Source"]
    assert by_key["seer"]["printed"]["Shared Model"] == "Model Agnostic²"
    assert by_key["seer"]["corrected"]["Shared Model"] == "Model Agnostic"
    assert by_key["lr_perturbation"]["corrected"]["Year"] == "2023"


def test_corrected_reference_links_are_not_broken_by_the_print(
    exported: dict[str, list[dict[str, Any]]],
) -> None:
    for row in exported["references"]:
        for link in row["links"]:
            assert not link["url"].endswith(".paper")
            assert "/paper/" not in link["url"].removeprefix("https://www.").split("?")[0] or (
                "arxiv" not in link["url"]
            )
            assert ":~:" not in link["url"]
