"""The tables in every format and both modes."""

import csv
import io
from html.parser import HTMLParser
from typing import get_args

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import tables
from leakatlas.catalogue.schema import Batch, Code, Stances
from leakatlas.errors import UnknownName


class Cells(HTMLParser):
    """The cells of an HTML table as text."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th", "a", "br") and (self.inside or tag in ("td", "th"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", tables.TABLES)
@pytest.mark.parametrize("mode", get_args(tables.Mode))
@pytest.mark.parametrize("form", get_args(tables.Format))
def test_every_format_has_every_row(name: str, mode: tables.Mode, form: str) -> None:
    content = tables.table(name, mode)
    text = tables.render(content, form)
    if form == "csv":
        read = list(csv.reader(io.StringIO(text)))
        assert [tuple(row) for row in read] == [content.columns, *content.rows]
    elif form == "html":
        parser = Cells()
        parser.feed(text)
        assert len(parser.rows) == len(content.rows) + 1
        assert all(len(row) == len(content.columns) for row in parser.rows)
    elif form == "latex":
        body = text.split(r"\endhead\n".replace(r"\n", "\n"))[1].split(r"\bottomrule")[0]
        lines = body.strip().splitlines()
        assert len(lines) == len(content.rows)
        for line in lines:
            assert line.replace(r"\&", "").count("&") == len(content.columns) - 1
    else:
        lines = text.splitlines()
        assert lines[0] == "| " + " | ".join(content.columns) + " |"
        assert all(line.startswith("| ") for line in lines[2 : 2 + len(content.rows)])


@pytest.mark.parametrize("name", tables.TABLES)
def test_latex_holds_no_character_that_latex_cannot_read(name: str) -> None:
    text = tables.render(tables.table(name, "corrected"), "latex")
    allowed = set("äöüćñáéíłÖáéćöñ") | {chr(c) for c in range(0x20, 0x7F)} | {"\n", "“", "”"}
    strange = {c for c in text if c not in allowed and not c.isalpha()}
    assert strange == set()


def test_the_printed_mode_marks_nothing_and_the_corrected_mode_says_why() -> None:
    printed, corrected = tables.table("attacks", "printed"), tables.table("attacks", "corrected")
    assert printed.changed == frozenset() and printed.reasons == ()
    text = tables.render(corrected, "markdown")
    assert text.count(" †") == len(corrected.changed)
    assert sum(len(row.corrections) for row in catalogue.attacks()) == len(corrected.reasons)
    assert "†" not in tables.render(printed, "markdown")


@pytest.mark.parametrize(
    ("batch", "cell"),
    [
        (Batch(size=8), "8"),
        (Batch(size=16, epochs=5), "5×16"),
        (Batch(size=64, local_steps=1), "1 step×64"),
        (Batch(size=16, local_steps=5), "5 steps×16"),
        (Batch(size=8, epochs=1, images=512), "1×8 of 512"),
        (Batch(), "N/A"),
    ],
)
def test_batches(batch: Batch, cell: str) -> None:
    assert tables.batch_cell(batch) == cell


@pytest.mark.parametrize(
    ("code", "cell"),
    [
        (Code(), "✗"),
        (Code(kind="various"), "~"),
        (Code(kind="colab", url="https://x.org/a"), "[colab](https://x.org/a)"),
        (
            Code(kind="link", url="https://x.org/a", official=False),
            "[third party](https://x.org/a)",
        ),
    ],
)
def test_code_links(code: Code, cell: str) -> None:
    assert tables.code_cell(code) == cell


def test_stances_are_written_as_runs() -> None:
    one = Stances.model_validate(dict.fromkeys("ABCDEFGH", "holds"))
    assert tables.stance_cell(one) == "A (green) - H (green)"
    mixed = Stances.model_validate({**dict.fromkeys("ABCDEFGH", "fails"), "A": "holds"})
    assert tables.stance_cell(mixed, ["A"]) == "A (green) <br> B (red) - H (red)"


def test_html_escapes_what_a_row_may_contain() -> None:
    cell = tables.links_to_html('<script>"x"</script> [a&b](https://x.org/?a=1&b=2)')
    assert "<script>" not in cell
    assert '<a href="https://x.org/?a=1&amp;b=2">a&amp;b</a>' in cell


def test_unknown_tables_and_formats_are_named() -> None:
    with pytest.raises(UnknownName, match=r"Unknown table 'attack'. Did you mean 'attacks'"):
        tables.table("attack")
    with pytest.raises(UnknownName, match="Unknown format 'tex'"):
        tables.render(tables.table("attacks"), "tex")


def test_every_correction_shows_as_a_change() -> None:
    for row in (*catalogue.attacks(), *catalogue.defenses(), *catalogue.references()):
        for change in tables.changes(row):
            assert change.printed != change.corrected, (tables.name_of(row), change)
            assert change.reason
