"""The shipped calibration: complete, with provenance, by its own rule, and refused if damaged."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from leakatlas.errors import InvalidInput
from leakatlas.lint import STATISTICS, calibration, findings, thresholds

ROOT = Path(__file__).resolve().parents[2]


def test_thresholds_follow_the_rule() -> None:
    assert thresholds.calibrated({"a": 0.2, "b": 0.4}) == pytest.approx(0.7)
    assert thresholds.calibrated({"a": 0.2, "b": 0.95}) == 1  # too near to certainty
    assert thresholds.calibrated({"a": 0.0, "b": 0.6}) == 1  # one run beyond all others' threshold
    assert thresholds.calibrated({}) == 1


def test_every_statistic_has_one_from_the_study() -> None:
    content = json.loads(thresholds.FILE.read_text(encoding="utf-8"))
    assert set(content["statistics"]) == set(STATISTICS) - findings.COMPARISONS
    for row in content["statistics"].values():
        expected = thresholds.threshold_of(row["largest"])
        assert row["threshold"] == 1 or row["threshold"] == pytest.approx(expected)
        assert 0 <= row["median"] <= row["largest"] <= 1
    made = calibration()
    assert set(made.thresholds) == set(STATISTICS)
    assert "benchmarks/lint.py" in made.provenance["command"]
    assert "to calibrate" in made.provenance["benign"] and made.provenance["date"]


def test_the_results_are_of_the_same_run() -> None:
    result = json.loads((ROOT / "results/lint/detectors.json").read_text(encoding="utf-8"))
    assert result["command"] == calibration().provenance["command"]
    assert result["schema"] == "leakatlas/result/1" and result["kind"] == "measure"
    named = {measure["name"]: measure for measure in result["measures"]}
    assert named["false_alarm/weights"]["n"] >= 100
    assert all("interval" in m and "note" in m for m in result["measures"])


def test_the_fresh_hold_out_judged_the_thresholds_in_use() -> None:
    result = json.loads((ROOT / "results/lint/fresh.json").read_text(encoding="utf-8"))
    seen = json.loads((ROOT / "results/lint/detectors.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(thresholds.FILE.read_bytes()).hexdigest()
    assert result["recipe"]["thresholds"] == digest
    assert not set(result["seeds"]) & set(seen["seeds"])
    assert result["recipe"]["images"] != seen["recipe"]["images"]
    named = {measure["name"]: measure for measure in result["measures"]}
    whole = named["false_alarm/weights, batch, reference, other clients"]
    assert round(whole["value"] * whole["n"]) == len(result["recipe"]["alarms"])
    assert named["false_alarm/weights/independent"]["n"] >= 200


def test_the_page_is_what_the_results_say() -> None:
    path = ROOT / "benchmarks/lint_page.py"
    spec = importlib.util.spec_from_file_location("lint_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/lint.md").read_text(encoding="utf-8") == module.page(ROOT)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"statistics": {"D1/detour": {}}}'])
def test_a_damaged_calibration_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text(content)
    with pytest.raises(InvalidInput, match="not a calibration"):
        thresholds.read(file)


def test_a_calibration_without_a_statistic_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "thresholds.json"
    file.write_text('{"statistics": {"D1/detour": {"threshold": 0.5}}}')
    with pytest.raises(InvalidInput, match="no threshold for"):
        thresholds.read(file)
