"""Our side against the official figures that are kept as data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from leakatlas import cli
from leakatlas.bench import differential
from leakatlas.catalogue import results
from leakatlas.errors import InvalidInput, UnknownName

KNOWN = differential.stored()
OURS = differential.ours()
AGAIN = [row for row, known in KNOWN.items() if known.official]


def test_every_side_has_its_other() -> None:
    assert AGAIN and sorted(OURS) == AGAIN


@pytest.mark.parametrize("row", AGAIN)
def test_ours_agrees_with_official_code(row: str) -> None:
    for comparison in differential.compare(row, KNOWN, OURS):
        assert comparison.equal, comparison


def test_a_figure_that_moved_is_apart() -> None:
    shifted = {"fishing": lambda: {n: 1.001 * v for n, v in OURS["fishing"]().items()}}
    assert not any(c.equal for c in differential.compare("fishing", KNOWN, shifted))


def test_no_number_is_never_equal() -> None:
    assert not differential.Comparison("x", "y", 1.0, float("nan"), 1e-3).equal


def test_sides_that_name_different_figures_are_told() -> None:
    with pytest.raises(InvalidInput, match="the official side has"):
        differential.compare("fishing", KNOWN, {"fishing": lambda: {"other": 1.0}})
    with pytest.raises(UnknownName, match="fishing"):
        differential.compare("fishin", KNOWN, OURS)


@pytest.mark.parametrize(("rows", "factor", "code"), [
    (("fishing",), 1.0, 0), (("fishing",), 1.001, 1), (("fishing", "seer"), 1.0, 3),
])  # fmt: skip
def test_the_command_says_what_is_apart_and_what_was_not_compared(
    rows: tuple[str, ...], factor: float, code: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "differential").mkdir()
    for row in rows:
        kept = results.default_folder() / "differential" / f"{row}.json"
        data = json.loads(kept.read_text(encoding="utf-8"))
        if row == "seer":  # as if its official figures had not been kept
            del data["official"]
        for figure in data.get("official", {}).values():
            figure["value"] *= factor
        (tmp_path / "differential" / kept.name).write_text(json.dumps(data), encoding="utf-8")
    command = ["leakatlas", "bench", "--differential", "--json", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == code
    assert {c["row"] for c in told["compared"]} == {"fishing"}
    assert all(c["equal"] for c in told["compared"]) == (factor == 1.0)
    assert told["recorded_only"] == [row for row in rows if row == "seer"]
