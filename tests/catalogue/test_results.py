"""Measured values: checked, dated by code version, and read into colours."""

import json
from pathlib import Path
from typing import Any

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import export, measured, pages, results


def document(**changes: Any) -> dict[str, Any]:
    return {
        "schema": "leakatlas/result/1",
        "kind": "attack",
        "key": "dlg",
        "code_version": 1,
        "recipe": {"attack": {"key": "dlg"}},
        "hardware": "2 CPU cores",
        "seeds": [0, 1],
        "measures": [{"name": "psnr", "value": 20.0, "unit": "dB", "interval": [19, 21], "n": 8}],
        "command": "leakatlas bench study.yaml",
        "date": "2026-01-31",
        **changes,
    }


def write(folder: Path, name: str = "dlg.json", **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(document(**changes)), encoding="utf-8")
    return path


@pytest.fixture
def version_of_dlg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class behind the row is at version 2."""
    monkeypatch.setattr(measured, "current_version", lambda kind, key: 2)


def test_a_sound_result_is_read(tmp_path: Path) -> None:
    found, problems = results.read(write(tmp_path))
    assert problems == [] and len(found) == 1
    assert results.of_row(results.load(tmp_path), "attack", "dlg") == found
    assert results.load(tmp_path / "nowhere") == ()


def measure(**changes: Any) -> dict[str, Any]:
    return {"measures": [{**document()["measures"][0], **changes}]}


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"schema": "leakatlas/result/0"}, "schema", "not allowed"),
        ({"kind": "attacks"}, "kind", "'attack'"),
        ({"key": "dgl"}, "key", "did you mean"),
        ({"code_version": "1"}, "code_version", "whole number"),
        ({"recipe": {}}, "recipe", "recipe"),
        ({"seeds": []}, "seeds", "seeds"),
        ({"date": "31.1.2026"}, "date", "2026-01-31"),
        ({"date": "2026-02-31"}, "date", "no day of the calendar"),
        (
            {"recipe": {"attack": {"key": "dlg", "parameters": {"stepz": 3}}}},
            "recipe.attack.parameters.stepz",
            "did you mean 'steps'",
        ),
        ({"recipe": {"defaults": {"inner": 1, "rate": 2}}}, "recipe.defaults.rate", "dlg has no"),
        (
            {"recipe": {"scenario": {"defenses": [{"key": "clipping", "norm": 1}]}}},
            "recipe.scenario.defenses[1].norm",
            "did you mean 'max_norm'",
        ),
        ({"measures": []}, "measures", "too short"),
        ({"surprise": 1}, "surprise", "no field"),
        (measure(interval=[21, 22]), "measures[1].interval", "does not contain"),
        (measure(interval=None), "measures[1].interval", "confidence interval"),
        (measure(value="20"), "measures[1].value", "number"),
        (measure(n=0), "measures[1].n", "greater than 0"),
        (measure(letter="Z"), "measures[1].letter", "A, B, C"),
    ],
)
def test_a_faulty_result_is_refused(
    tmp_path: Path, changes: dict[str, Any], field: str, word: str
) -> None:
    _, problems = results.read(write(tmp_path, **changes))
    assert [problem.field for problem in problems] == [field]
    assert "dlg.json" in str(problems[0]) and word in str(problems[0])


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dlg.json"
    path.write_text("{", encoding="utf-8")
    _, problems = results.read(path)
    assert "no valid JSON" in str(problems[0])


def test_a_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dlg.json"
    path.write_text("[]", encoding="utf-8")
    _, problems = results.read(path)
    assert len(problems) == 1


@pytest.mark.usefixtures("version_of_dlg")
def test_an_older_code_version_is_stale_and_shown_so(tmp_path: Path) -> None:
    write(tmp_path, "old.json", code_version=1)
    write(tmp_path, "new.json", code_version=2)
    found = results.load(tmp_path)
    assert [result.stale for result in found] == [False, True]
    row = next(a for a in export.export(tmp_path)["attacks"] if a["key"] == "dlg")
    assert [entry["stale"] for entry in row["measured"]] == [False, True]
    page = pages.attack_page(catalogue.attack("dlg"), found)
    assert "| current |" in page and "| outdated |" in page


def test_figures_from_before_study_files_are_marked_everywhere(tmp_path: Path) -> None:
    """Nobody knows the code behind them, so they are stale however young; the study is named."""
    path = write(tmp_path, "old.json", carried_over=True, study="dlg", command="python gone.py")
    (result,), problems = results.read(path)
    assert problems == [] and result.stale and not result.outdated
    assert (result.state, result.again) == ("carried over", "leakatlas bench dlg")
    page = pages.attack_page(catalogue.attack("dlg"), (result,))
    assert "| carried over" in page and "`leakatlas bench dlg`" in page and "gone.py" not in page


def test_studies_are_never_stale(tmp_path: Path) -> None:
    (result,), problems = results.read(write(tmp_path, kind="benchmark", key="cifar-study"))
    assert problems == [] and not result.stale


@pytest.mark.parametrize(
    ("rate", "stance"),
    [(0.0, "holds"), (0.05, "holds"), (0.06, "partial"), (0.49, "partial"), (0.5, "fails")],
)
def test_colours_of_success_rates(rate: float, stance: str) -> None:
    assert results.stance_of(rate) == stance


def test_the_worst_measured_rate_of_a_letter_counts(tmp_path: Path) -> None:
    def rate(value: float, letter: str, **more: Any) -> dict[str, Any]:
        return {"name": "success_rate", "value": value, "interval": [0, 1], "n": 32,
                "letter": letter, **more}  # fmt: skip

    measures = [rate(0.0, "A"), rate(0.9, "B", vantage="wire"), rate(0.0, "B", vantage="aggregate")]
    write(tmp_path, "soteria.json", kind="defense", key="soteria", measures=measures)
    found = results.load(tmp_path)
    assert results.measured_stances(found, "soteria") == {"A": "holds", "B": "fails"}
    page = pages.defense_page(catalogue.defense("soteria"), found)
    assert "| Measured | holds | fails | not yet |" in page
    # Code that is no more decides nothing where the present code measured.
    old = [rate(1.0, "A"), rate(1.0, "C")]
    write(tmp_path, "old.json", kind="defense", key="soteria", measures=old, carried_over=True,
          study="dlg")  # fmt: skip
    stances = results.measured_stances(results.load(tmp_path), "soteria")
    assert stances == {"A": "holds", "B": "fails", "C": "fails"}


@pytest.mark.usefixtures("version_of_dlg")
def test_stale_rates_give_no_colour(tmp_path: Path) -> None:
    measures = [{"name": "success_rate", "value": 0.9, "interval": [0, 1], "n": 32, "letter": "A"}]
    write(tmp_path, "soteria.json", kind="defense", key="soteria", measures=measures)
    assert results.measured_stances(results.load(tmp_path), "soteria") == {}


def test_the_results_of_this_checkout_are_sound() -> None:
    for path in sorted(results.default_folder().glob("*.json")):
        _, problems = results.read(path)
        assert problems == [], [str(problem) for problem in problems]
