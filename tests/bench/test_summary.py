"""Figures that a study computes over all its cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leakatlas.bench import own, runner
from leakatlas.bench import study as studies
from leakatlas.bench.runner import Options
from leakatlas.catalogue import results
from leakatlas.errors import InvalidInput

STUDY: dict[str, Any] = {
    "schema": "leakatlas/study/1",
    "title": "A study with a summary",
    "question": "Do figures over all cases arrive?",
    "chosen": "nothing",
    "setup": {
        "model": "fc",
        "victims": "photos:8",
        "measures": [{"name": "value"}],
        "seeds": [1, 2],
    },
    "axes": {"letter": ["A", "B"]},
    "summary": True,
}
MEASURE = "def measure(cell):\n    return {'value': float(cell.seed)}\n"
FIGURE = (
    "def summarise(study, records):\n"
    "    total = sum(r.own['value'] for mine in records.values() for r in mine)\n"
    "    return [{'name': 'total', 'value': total, 'unit': '', 'interval': (total, total),\n"
    "             'interval_by': 'bootstrap', 'n': 4, 'images': 4}]\n"
)


def test_it_sees_every_record_and_stands_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "small"
    home.mkdir()
    (home / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    (home / "study.py").write_text(MEASURE + FIGURE, encoding="utf-8")
    options = Options(
        records=tmp_path / "records", results=tmp_path / "results", data=tmp_path, trust_code=True
    )
    runner.run_study(studies.load(home), options)
    path = tmp_path / "results" / "small.json"
    found, problems = results.read(path)
    assert not problems
    (result,) = found
    assert (result.kind, result.key) == ("benchmark", "small")
    (total,) = [measure for measure in result.measures if measure.name == "total"]
    assert (total.value, total.n, total.case) == (1 + 2 + 1 + 2, 4, "")

    path.unlink()
    for code, word in (
        (MEASURE, "must define summarise"),
        (MEASURE + FIGURE.replace("'n': 4", "'m': 4"), "malformed at n"),
    ):
        monkeypatch.setattr(own, "_LOADED", {})
        (home / "study.py").write_text(code, encoding="utf-8")
        with pytest.raises(InvalidInput, match=word):
            runner.write(studies.load(home), options)
        assert not path.exists()


def test_a_summary_that_nobody_computes_is_said(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(
            {**STUDY, "setup": {**STUDY["setup"], "attack": "rgap", "measures": ["psnr"]}}
        ),
        encoding="utf-8",
    )
    study, problems = studies.check(path)
    assert study is None and [problem.field for problem in problems] == ["summary"]
