"""The built files, without a browser."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from leakatlas import catalogue, site
from leakatlas.catalogue import results
from leakatlas.errors import InvalidInput
from leakatlas.site import guide


class Anchors(HTMLParser):
    """Ids, links, headings and resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.headings: list[int] = []
        self.labelled: list[str] = []
        self.inline = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag in ("script", "link", "img"):
            self.resources += [values[name] for name in ("src", "href") if name in values]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.labelled += values.get("aria-labelledby", "").split()
        self.inline = self.inline or "style" in values or any(n.startswith("on") for n in values)


@pytest.fixture(scope="module")
def parsed(built: Path) -> dict[Path, Anchors]:
    return {path: Anchors(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}


def test_every_page_is_written_and_small(tmp_path: Path) -> None:
    written = site.build(tmp_path)
    assert written[0] == tmp_path / "index.html"
    rows = len(catalogue.attacks()) + len(catalogue.defenses()) + len(catalogue.threat_models())
    chapters = guide.pages(results.repository_root())
    assert len(written) == 8 + rows + len(chapters) == len(list(tmp_path.rglob("*.html")))
    assert (tmp_path / "index.html").stat().st_size < 1_000_000
    assert all(path.stat().st_size < 1_000_000 for path in written)


def test_building_twice_gives_the_same_files(measured: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        site.build(folder, results_folder=measured)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes()


def test_every_internal_link_leads_to_a_page_and_a_place(parsed: dict[Path, Anchors]) -> None:
    known = {path.resolve() for path in parsed}
    for path, page in parsed.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme in ("http", "https")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target in known, (path.name, link)
            if parts.fragment and "=" not in parts.fragment:
                assert parts.fragment in parsed[path if not parts.path else target].ids


def test_nothing_is_loaded_from_elsewhere(parsed: dict[Path, Anchors]) -> None:
    for path, page in parsed.items():
        for resource in page.resources:
            assert resource == "data:," or (path.parent / resource).is_file()
        assert not page.inline, f"{path.name} has inline style or handlers"


def test_headings_ids_and_labels_are_in_order(parsed: dict[Path, Anchors]) -> None:
    for path, page in parsed.items():
        assert page.headings[0] == 1 and page.headings.count(1) == 1, path.name
        steps = zip(page.headings, page.headings[1:], strict=False)
        assert all(after - before <= 1 for before, after in steps), (path.name, page.headings)
        assert len(page.ids) == len(set(page.ids)), path.name
        assert set(page.labelled) <= set(page.ids), path.name


def test_what_rows_and_results_contain_is_escaped(built: Path) -> None:
    text = (built / "defenses" / "soteria.html").read_text(encoding="utf-8")
    assert "leakatlas bench &lt;study&gt; &amp; more" in text
    assert "<study>" not in text


def test_every_row_page_holds_its_facts(built: Path) -> None:
    for row in catalogue.attacks():
        text = (built / "attacks" / f"{row.key}.html").read_text(encoding="utf-8")
        work = catalogue.reference(row.reference).corrected()
        assert f"@{work.entry}{{{work.key}," in text
        assert all(claim.measure in text for claim in row.reported)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "assets").touch()
    with pytest.raises(InvalidInput, match="cannot be written to"):
        site.build(tmp_path / "out")


def test_the_guide_and_every_example_are_pages(built: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    for path in (root / "docs" / "guide").glob("*.md"):
        name = "index" if path.stem == "README" else path.stem
        text = (built / "guide" / f"{name}.html").read_text(encoding="utf-8")
        assert 'aria-current="page"' in text and "<!-- generated" not in text
    for path in (root / "examples").glob("*.py"):
        page = built / "guide" / f"example-{path.stem.replace('_', '-')}.html"
        assert path.read_text(encoding="utf-8").splitlines()[-1] in page.read_text("utf-8")
    assert 'href="guide/index.html"' in (built / "index.html").read_text(encoding="utf-8")


def test_html_in_the_guide_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "guide"
    folder.mkdir(parents=True)
    evil = "# One <b>x</b>\n\n<script>alert(1)</script> [away](../../secret.md) [x](javascript:y)\n"
    (folder / "README.md").write_text(evil)
    (page,) = guide.pages(tmp_path)
    assert "<script>" not in page.html and "<b>" not in page.html and "href" not in page.html
    assert guide.pages(None) == [] == guide.pages(tmp_path / "docs")
