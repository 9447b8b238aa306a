"""The shipped calibration: complete, with provenance, by its own rule, and refused if damaged."""

import json
from pathlib import Path

import pytest

from leakatlas.errors import InvalidInput
from leakatlas.lint import STATISTICS, calibration, holdings, thresholds


def test_thresholds_follow_the_rule() -> None:
    assert thresholds.calibrated({"a": 0.2, "b": 0.4}) == pytest.approx(0.7)
    assert thresholds.calibrated({"a": 0.2, "b": 0.95}) == 1  # too near to certainty
    assert thresholds.calibrated({"a": 0.0, "b": 0.6}) == 1  # one run beyond all others' threshold
    assert thresholds.calibrated({}) == 1


def test_every_statistic_has_one_from_the_study() -> None:
    content = json.loads(thresholds.FILE.read_text(encoding="utf-8"))
    assert set(content["statistics"]) == set(holdings.CALIBRATED)
    for row in content["statistics"].values():
        expected = thresholds.threshold_of(row["largest"])
        assert row["threshold"] == 1 or row["threshold"] == pytest.approx(expected)
        assert 0 <= row["median"] <= row["largest"] <= 1
    made = calibration()
    assert set(made.thresholds) == set(STATISTICS)
    assert "lint" in made.provenance["command"]
    assert "to calibrate" in made.provenance["benign"] and made.provenance["date"]


def test_a_fingerprint_is_of_the_measured_thresholds() -> None:
    table = dict(calibration().thresholds)
    plain = thresholds.fingerprint(table)
    assert plain == thresholds.fingerprint({n: table[n] for n in holdings.CALIBRATED})
    assert plain != thresholds.fingerprint({**table, "D2/rank": 0.5})


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
