"""The catalogue's commands, typed as a person types them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from leakatlas import catalogue
from leakatlas.catalogue import measured, results
from leakatlas.cli import catalogue as commands
from leakatlas.site import guide

ROOT = Path(__file__).resolve().parents[2]

app = typer.Typer()
commands.register(app)


def run(*arguments: str | Path, columns: int = 200) -> Result:
    runner = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"})
    return runner.invoke(app, [str(argument) for argument in arguments])


def machine(*arguments: str | Path) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def template() -> str:
    """The template under a name that no row has, not even where the guide was followed."""
    text = (ROOT / "docs" / "row-template.toml").read_text(encoding="utf-8")
    return text.replace("lantern", "beacon").replace("Lantern", "Beacon")


ROWS = len(catalogue.attacks()) + len(catalogue.defenses())


def test_list_shows_every_row() -> None:
    result = run("list")
    assert result.exit_code == 0
    assert f"{ROWS} of {ROWS} rows" in result.stdout and "inverting_gradients" in result.stdout


def test_list_filters_on_several_columns() -> None:
    published = ("list", "--where", "origin=published")
    found = machine(*published, "-t", "d", "--algorithm", "fedavg")
    assert [row["key"] for row in found] == ["rog"]
    found = machine("list", "--where", "year=2024", "--kind", "attack")
    assert {row["year"] for row in found} == {2024}
    formal = machine(*published, "--holds-against", "H", "--category", "formal")
    assert [row["key"] for row in formal] == ["homomorphic_encryption"]
    assert machine("list", "--implemented", "--not-tested", "-w", "key=nothing") == []


def test_list_in_printed_mode_ignores_corrections() -> None:
    corrected = {row["key"] for row in machine("list", "-t", "E", "-w", "origin=published")}
    printed = {row["key"] for row in machine("list", "-t", "E", "--printed")}
    assert printed - corrected == {"gradvit", "hf_gradinv"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "-t", "Z"), "Unknown threat model 'Z'"),
        (("list", "--algorithm", "fedsdg"), "Did you mean 'fedsgd'"),
        (("list", "--where", "year"), "write COLUMN=VALUE"),
        (("list", "--where", "yaer=2024"), "Did you mean 'year'"),
        (("show", "sotera"), "Did you mean 'soteria'"),
        (("cite", "nobody"), "Unknown attack, defense or reference"),
        (("table", "attack"), "Did you mean 'attacks'"),
        (("table", "attacks", "--format", "tex"), "Unknown format 'tex'"),
        (("table", "attacks", "--mode", "raw"), "Unknown mode 'raw'"),
        (("export", "--format", "xml"), "Unknown format 'xml'"),
        (("validate", "nowhere.toml"), "no file nowhere.toml"),
        (("validate", "README"), "no file README"),
    ],
)
def test_bad_input_leaves_with_2_and_says_the_way_out(
    arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("dlfa", ("DLFA [6]", "Corrections", "printed", "FEMNIST", "Data Leakage")),
        ("soteria", ("Soteria [45]", "[53] on A, B", "160 x")),
        ("D", ("Data-Enhanced Eavesdropper",)),
        ("53", ("Bayesian Framework",)),
        ("[38]", ("Client-side DP",)),
    ],
)
def test_show_tells_everything_about_a_row(key: str, words: tuple[str, ...]) -> None:
    result = run("show", key)
    assert result.exit_code == 0, result.output
    for word in words:
        assert word in result.stdout
    assert machine("show", key)["printed"]


def test_show_fits_a_narrow_terminal() -> None:
    result = run("show", "fishing", columns=60)
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 60


def test_show_puts_measured_beside_reported(tmp_path: Path) -> None:
    document = {
        "schema": "leakatlas/result/1", "kind": "attack", "key": "dlg",
        "code_version": results.current_version("attack", "dlg") or 1,
        "recipe": {"attack": {"key": "dlg"}}, "hardware": "2 CPU cores", "seeds": [0],
        "measures": [{"name": "psnr", "value": 31.25, "unit": "dB", "interval": [30, 32], "n": 9}],
        "command": "leakatlas bench study.yaml", "date": "2026-01-31",
    }  # fmt: skip
    (tmp_path / "dlg.json").write_text(json.dumps(document), encoding="utf-8")
    result = run("show", "dlg", "--results", tmp_path)
    assert result.exit_code == 0
    assert "31.25 dB" in result.stdout and "[30, 32]" in result.stdout and "fresh" in result.stdout
    assert "23.4 dB" in result.stdout


def test_cite_gives_bibtex_of_rows_and_of_a_run(tmp_path: Path) -> None:
    text = run("cite", "dlg", "[45]").stdout
    assert "@inproceedings{zhu2019deep," in text and "@inproceedings{sun2021soteria," in text
    recipe = {"attack": {"key": "rgap"}, "scenario": {"defenses": [{"key": "clipping"}]}}
    (tmp_path / "report.json").write_text(json.dumps({"runs": [{"recipe": recipe}]}))
    text = run("cite", tmp_path).stdout
    assert "% rgap (attack)" in text and "% clipping (defense)" in text
    assert [entry["name"] for entry in machine("cite", tmp_path)] == ["rgap", "clipping"]
    (tmp_path / "report.json").write_text("broken")
    assert run("cite", tmp_path).exit_code == 2


@pytest.mark.parametrize("form", ["markdown", "latex", "html", "csv"])
def test_table_writes_every_format(form: str, tmp_path: Path) -> None:
    printed = run("table", "attacks", "--format", form, "--mode", "printed")
    assert printed.exit_code == 0 and "Zhu et al. (2019)" in printed.stdout
    out = tmp_path / "deep" / "table"
    assert run("table", "attacks", "-f", form, "--mode", "printed", "-o", out).exit_code == 0
    assert out.read_text(encoding="utf-8") == printed.stdout
    assert run("table", "attacks", "-f", form, "-o", tmp_path).exit_code == 2


def test_table_as_json_holds_the_cells() -> None:
    rows = machine("table", "threat-models", "--mode", "printed")
    assert rows[0]["Threat Model"] == "Eavesdropper"


def test_export_has_a_stable_shape() -> None:
    document = json.loads(run("export").stdout)
    assert list(document) == ["threat_models", "attacks", "defenses", "references"]
    for name, rows in document.items():
        assert len(rows) == len(getattr(catalogue, name)())
    for row in document["attacks"]:
        assert {"number", "key", "implemented", "printed", "corrected", "bibtex"} <= set(row)
    schema = json.loads(run("export", "--format", "schema").stdout)
    assert schema["title"] == "LeakAtlas catalogue"


def test_validate_accepts_the_catalogue() -> None:
    result = run("validate")
    assert result.exit_code == 0, result.output
    assert "0 problems" in result.stdout


def test_validate_finds_every_problem_and_leaves_with_1(tmp_path: Path) -> None:
    text = template()
    good = tmp_path / "lantern.toml"
    good.write_text(text, encoding="utf-8")
    assert run("validate", good).exit_code == 0
    bad = tmp_path / "broken.toml"
    bad.write_text(
        text.replace('threat_model = "B"', 'threat_model = "Z"').replace("{ size = 8 }", '"8"'),
        encoding="utf-8",
    )
    result = run("validate", bad)
    assert result.exit_code == 1
    assert "threat_model: 'Z' is not allowed" in result.stdout
    assert "2 problems" in result.stdout
    document = run("validate", bad, "--json")
    assert document.exit_code == 1
    assert {p["field"] for p in json.loads(document.stdout)["problems"]} == {
        "threat_model",
        "batch",
    }


def test_validate_names_stale_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "current_version", lambda kind, key: 4)
    document = {
        "schema": "leakatlas/result/1", "kind": "attack", "key": "dlg", "code_version": 3,
        "recipe": {"attack": {"key": "dlg"}}, "hardware": "2 CPU cores", "seeds": [0],
        "measures": [{"name": "psnr", "value": 31.0, "unit": "dB", "interval": None, "n": 1}],
        "command": "leakatlas bench study.yaml", "date": "2026-01-31",
    }  # fmt: skip
    path = tmp_path / "dlg.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    result = run("validate", path)
    assert result.exit_code == 0
    assert "stale: dlg.json: measured with version 3" in result.stdout
    assert "1 stale" in result.stdout


def test_validate_goes_on_after_a_result_about_no_row(tmp_path: Path) -> None:
    document = {
        "schema": "leakatlas/result/1", "kind": "attack", "key": "dgl", "code_version": 3,
        "recipe": {"attack": {"key": "dlg"}}, "hardware": "2 CPU cores", "seeds": [0],
        "measures": [{"name": "psnr", "value": 31.0, "unit": "dB", "interval": None, "n": 1}],
        "command": "leakatlas bench study.yaml", "date": "2026-02-31",
    }  # fmt: skip
    (tmp_path / "first.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "second.json").write_text("{", encoding="utf-8")
    result = run("validate", "--results", tmp_path)
    assert result.exit_code == 1, result.output
    assert "first.json: dgl: key: there is no attack 'dgl'. Fix: did you mean" in (result.stdout)
    assert "first.json: dgl: date: 2026-02-31 is no day of the calendar" in result.stdout
    assert "second.json: is no valid JSON" in result.stdout
    assert "3 problems" in result.stdout


def test_validate_reads_studies(tmp_path: Path) -> None:
    text = (ROOT / "studies" / "idlg" / "study.yaml").read_text(encoding="utf-8")
    path = tmp_path / "own" / "study.yaml"
    path.parent.mkdir()
    path.write_text(text.replace("letter: ", "letters: "), encoding="utf-8")
    result = run("validate", path)
    assert result.exit_code == 1
    assert "own/study.yaml" in result.stdout and "letters" in result.stdout
    count = len(list((ROOT / "studies").glob("*/study.yaml")))
    good = run("validate", *sorted((ROOT / "studies").glob("*/study.yaml")))
    assert good.exit_code == 0 and f"{count} files checked, 0 problems" in good.stdout


def test_validate_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.touch()
    assert run("validate", path).exit_code == 2


def test_site_build_writes_the_pages(tmp_path: Path) -> None:
    document = machine("site", "build", tmp_path / "out")
    assert Path(document["index"]).is_file()
    chapters = guide.pages(ROOT)
    assert chapters
    expected = 8 + ROWS + len(catalogue.threat_models()) + len(chapters)
    assert document["pages"] == expected
    path = tmp_path / "file"
    path.touch()
    assert run("site", "build", path).exit_code == 2


def test_the_contribution_guide_shows_what_the_command_says(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "contributing-a-row.md").read_text(encoding="utf-8")
    text = template()
    path = tmp_path / "lantern.toml"
    path.write_text(
        text.replace('threat_model = "B"', 'threat_model = "Z"').replace("{ size = 8 }", '"8"'),
        encoding="utf-8",
    )
    for line in run("validate", path).stdout.splitlines():
        assert line.replace(str(path), "lantern.toml").replace("beacon", "lantern") in guide


def test_help_needs_neither_rows_nor_torch() -> None:
    code = (
        "import sys; from leakatlas.cli import catalogue;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'leakatlas.catalogue.schema')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
