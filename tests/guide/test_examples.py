"""The five programs in ``examples/`` run, and show what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    del cache
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: str, *, within: str = ".") -> ModuleType:
    path = ROOT / "examples" / within / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_five_and_every_one_is_tested_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) == 5
    assert all(f'load("{name}")' in text for name in EXAMPLES)


def test_own_model(folder: Path) -> None:
    report = load("own_model").main()
    assert [found.letter for found in report.standings()] == ["C", "G"]
    assert all(found.deployed != "not tested" for found in report.standings())
    assert (folder / "leak-report" / "report.html").is_file()


def test_captured_update(folder: Path) -> None:
    report = load("captured_update").main()
    assert {run.verdict for run in report.runs if run.tried} == {"not scored"}
    assert any(run.tried and run.pictures is not None for run in report.runs)
    assert report.realism[0].record["update"] == "captured"
    assert report.realism[0].separates == ()  # one example: its label stands in the update


def test_head_only() -> None:
    reports = load("head_only").main()
    facts = {
        name: next(iter(report.diagnoses.values()))["facts"]["shared parameters"]
        for name, report in reports.items()
    }
    assert facts == {"whole": 8 * 3 * 9 + 8 + 392 * 8 + 8, "head only": 392 * 8 + 8}
    records = {name: report.realism[0].record["shared"] for name, report in reports.items()}
    assert records == {"whole": ["*"], "head only": ["fc.*"]}


def test_ci_gate(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("ci_gate").main() == 0
    assert "does not hold on what ran" in capsys.readouterr().out


def test_dpia_report(folder: Path) -> None:
    report = load("dpia_report").main()
    page = (folder / "leak-report" / "report.html").read_text(encoding="utf-8")
    for words in ("Aggregator Ltd.", "2030-01-31", "Residual risk", "Not assessed here"):
        assert words in page
    assert [c.name for c in report.comparisons] == ["as configured", "clipping", "noise"]
    assert report.facts["guarantees"]["comparisons"]["noise"][0]["rounds"] == 20


def test_opacus_client(capsys: pytest.CaptureFixture[str]) -> None:
    """Framework by framework; those that cannot live here are in tests/frameworks."""
    client = load("client", within="opacus")
    report = client.main()
    said = capsys.readouterr().out
    assert "noise multiplier 1" in said
    assert "has counted epsilon" in said
    assert any("has counted epsilon" in finding for d in report.diagnoses.values()
               for finding in d["findings"])  # fmt: skip
    assert [run.tried for run in report.runs] == [True]
