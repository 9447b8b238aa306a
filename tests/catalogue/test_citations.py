"""BibTeX of rows, and of what a run used."""

import json
import re
from pathlib import Path

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import citations, loader
from leakatlas.errors import InvalidInput, UnknownName


def test_every_work_has_a_well_formed_entry() -> None:
    keys = []
    for work in catalogue.references():
        text = citations.bibtex(work)
        head = re.match(r"@(\w+)\{(\w+),\n", text)
        assert head is not None
        keys.append(head[2])
        assert text.count("{") == text.count("}")
        assert "title = {{" in text and "author = {" in text and f"year = {{{work.year}}}" in text
        assert ".paper}" not in text  # the link is the corrected one
        assert not re.search(r"(?<!\\)[&%#](?!.*url)", text.split("  url")[0])
    assert len(set(keys)) == len(keys) == len(catalogue.references())


def test_pages_are_never_invented() -> None:
    assert not any("pages" in citations.bibtex(work) for work in catalogue.references())


def test_a_defense_cites_what_it_rests_on() -> None:
    assert [w.number for w in citations.references_of("secure_aggregation")] == [40, 41]
    assert [w.number for w in citations.references_of("homomorphic_encryption")] == [40]
    assert [w.number for w in citations.references_of("[42]")] == [42]
    assert [w.number for w in citations.references_of("IG")] == [3]
    with pytest.raises(UnknownName, match="attack, defense or reference"):
        citations.references_of("nobody")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    runs = [
        {
            "recipe": {
                "attack": {"key": key, "version": 1},
                "scenario": {"defenses": [{"key": d} for d in defenses]},
            }
        }
        for key, defenses in (("dlg", []), ("rgap", ["soteria"]), ("dlg", ["soteria", "clipping"]))
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"runs": [*runs, {"recipe": None}, 3]}), encoding="utf-8")
    return path


def test_a_run_cites_what_it_really_used(report: Path) -> None:
    used = citations.used_in(report.parent)
    assert used == citations.used_in(report)
    assert used == {
        "dlg": ("attack",),
        "rgap": ("attack",),
        "soteria": ("defense",),
        "clipping": ("defense",),
    }
    text = citations.bibliography(used)
    for key in ("carletti2025sok", "zhu2019deep", "zhu2021rgap", "sun2021soteria"):
        assert text.count(f"{{{key},") == 1
    assert "% soteria (defense)" in text


def test_a_deployed_defense_without_a_paper_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    row = catalogue.defense("clipping")
    bare = row.model_copy(update={"works": (), "ships_in": "Framework 1.0: module.Class"})
    monkeypatch.setattr(loader, "defense", lambda key: bare)
    text = citations.bibliography({"bare": ("defense",)})
    assert "% bare (defense): no paper; ships in Framework 1.0: module.Class" in text


def test_a_work_behind_two_rows_is_given_once() -> None:
    text = citations.bibliography({"rog": ("attack",), "quantization": ("defense",)})
    assert text.count("@inproceedings{yue2023gradient,") == 1
    assert "% rog (attack), quantization (defense)" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": 3}', "\x00"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"report\.json"):
        citations.used_in(path)


def test_a_missing_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no report"):
        citations.used_in(tmp_path)
