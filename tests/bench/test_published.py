"""Figures that were measured elsewhere stay in the result file when something is run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from leakatlas.bench import runner
from leakatlas.bench import study as studies
from leakatlas.bench.record import Record, Status
from leakatlas.bench.runner import Options
from leakatlas.bench.store import Store
from leakatlas.bench.study import Study
from leakatlas.errors import InvalidInput

UTILITY = {"train": "digits", "test": "digits", "rounds": 1, "rates": [0.5]}
FILE: dict[str, Any] = {
    "schema": "leakatlas/study/1", "title": "Small", "question": "Does it stay?",
    "chosen": "nothing",
    "setup": {
        "model": "lenet", "victims": "digits", "seeds": [0, 1], "utility": UTILITY,
        "measures": [{"name": "accuracy"}],
    },
    "axes": {"defense": {"none": {}, "some": {"defenses": [{"key": "clipping"}]}}},
    "compare": [{"measure": "accuracy", "of": "some", "minus": "none"}],
}  # fmt: skip
OLD: dict[str, Any] = {"processor": "Other", "cores": 4}


def made(folder: Path, **changes: Any) -> Study:
    home = folder / "small"
    home.mkdir(parents=True, exist_ok=True)
    (home / "study.yaml").write_text(
        yaml.safe_dump({**FILE, **changes}, sort_keys=False), encoding="utf-8"
    )
    return studies.load(home)


def at(folder: Path, machine: str) -> Options:
    return Options(records=folder / machine, results=folder / "results")


def measured(
    study: Study, options: Options, case: str, *values: float, day: str,
    status: Status = "complete", **of: Any,
) -> None:  # fmt: skip
    cells = [cell for cell in runner.standing(study, options).cells if cell.label == case]
    for cell, value in zip(cells, values, strict=False):
        Store(options.records / study.name).append(
            Record(
                cell=cell.name, code=cell.code_hash, study=study.name, label=case, seed=cell.seed,
                batch=0, status=status, recipe={}, own={"accuracy": value},
                started=f"{day}T00:00:00+00:00", machine=of,
            )
        )  # fmt: skip


def figures(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "results" / "small.json").read_text(encoding="utf-8"))
    return {case["case"]: case["measures"][0]["value"] for case in document["cases"]}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Study:
    """A study that another machine has run and published."""
    study, there = made(tmp_path), at(tmp_path, "there")
    measured(study, there, "none", 0.5, 0.7, day="2026-01-02", **OLD)
    measured(study, there, "some", 0.3, 0.4, day="2026-01-02", **OLD)
    assert runner.write(study, there) is not None and runner.elsewhere(study, there) == ""
    return study


def test_a_new_case_joins_those_of_another_machine(tmp_path: Path, elsewhere: Study) -> None:
    path = tmp_path / "results" / "small.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    axes = {"defense": {**FILE["axes"]["defense"], "new": {"note": "third"}}}
    study, here = made(tmp_path, axes=axes), at(tmp_path, "here")
    measured(study, here, "new", 0.9, 0.9, day="2026-03-04", processor="Mine", cores=2)
    assert runner.write(study, here) == path
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["cases"][:2] == before["cases"] and after["compare"] == before["compare"] != []
    assert figures(tmp_path)["new"] == pytest.approx(0.9)
    assert after["dates"] == ["2026-01-02", "2026-03-04"]
    assert sorted(machine["processor"] for machine in after["machines"]) == ["Mine", "Other"]
    assert "2 cases whose records are not on this machine" in runner.elsewhere(study, here)


def test_part_of_a_case_does_not_take_the_place_of_the_whole(
    tmp_path: Path, elsewhere: Study
) -> None:
    here = at(tmp_path, "here")
    measured(elsewhere, here, "none", 0.1, day="2026-03-04")
    measured(elsewhere, here, "some", 0.0, 0.0, day="2026-03-04", status="error")
    runner.write(elsewhere, here)
    assert figures(tmp_path) == pytest.approx({"none": 0.6, "some": 0.35})
    measured(elsewhere, here, "none", 0.1, 0.2, day="2026-03-04")
    runner.write(elsewhere, here)
    assert figures(tmp_path) == pytest.approx({"none": 0.15, "some": 0.35})
    # Of the difference one side is of other trainings now: it is no difference of these figures.
    document = json.loads((tmp_path / "results" / "small.json").read_text(encoding="utf-8"))
    assert document["compare"] == []
    assert "Left out, until both sides are run here: some - none." in runner.elsewhere(
        elsewhere, here
    )


@pytest.mark.parametrize(
    "axes",
    [
        {"defense": {"none": {}, "some": {"defenses": [{"key": "clipping", "max_norm": 2.0}]}}},
        {"defense": {"none": {}}},
    ],
    ids=["set up otherwise", "gone"],
)  # fmt: skip
def test_a_case_that_the_study_no_longer_has_goes(
    tmp_path: Path, elsewhere: Study, axes: dict[str, Any]
) -> None:
    study, here = made(tmp_path, axes=axes, compare=[]), at(tmp_path, "here")
    measured(study, here, "none", 0.1, day="2026-03-04")
    runner.write(study, here)
    assert figures(tmp_path) == pytest.approx({"none": 0.6})


def test_other_words_about_a_case_are_no_other_case(tmp_path: Path, elsewhere: Study) -> None:
    setup = {**FILE["setup"], "note": "said later", "time": "1h"}
    study, here = made(tmp_path, setup=setup), at(tmp_path, "here")
    measured(study, here, "none", 0.1, 0.1, day="2026-03-04")
    runner.write(study, here)
    assert figures(tmp_path) == pytest.approx({"none": 0.1, "some": 0.35})


def test_a_sum_over_all_cases_waits_for_all_of_them(tmp_path: Path, elsewhere: Study) -> None:
    study, here = made(tmp_path, correlate=True), at(tmp_path, "here")
    path = tmp_path / "results" / "small.json"
    before = path.read_text(encoding="utf-8")
    measured(study, here, "none", 0.1, 0.2, day="2026-03-04")
    assert runner.write(study, here) is None and path.read_text(encoding="utf-8") == before
    assert "stays as it was: it sums up 1 case whose" in runner.elsewhere(study, here)
    measured(study, here, "some", 0.1, 0.2, day="2026-03-04")
    assert runner.write(study, here) == path and runner.elsewhere(study, here) == ""


def test_what_is_no_result_file_is_not_written_over(tmp_path: Path) -> None:
    study, here = made(tmp_path), at(tmp_path, "here")
    path = tmp_path / "results" / "small.json"
    path.parent.mkdir()
    path.write_text('{"mine": 1}', encoding="utf-8")
    measured(study, here, "none", 0.1, day="2026-03-04")
    with pytest.raises(InvalidInput, match=r"small\.json is no result file.*--results"):
        runner.write(study, here)
    assert path.read_text(encoding="utf-8") == '{"mine": 1}'
