"""What a study leaves to be seen: its first victims, whole and honest, across its cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from leakatlas.bench import picture, runner
from leakatlas.bench import study as studies
from leakatlas.bench.adversary import Here
from leakatlas.bench.record import Record
from leakatlas.bench.run import run_cell
from leakatlas.bench.runner import Options
from leakatlas.bench.store import Store
from leakatlas.site import pictures

TEXT = """
schema: leakatlas/study/1
title: A blink
question: What is left to be seen?
chosen: nothing
setup:
  model: {builtin: lenet, kwargs: {size: 8, classes: 10, width: 4}}
  victims: {set: "photos:8", count: 3}
  surrogate: {set: "photos:8", first: 3}
  attack: {key: dlg, parameters: {steps: 2, inner: 2}}
  letter: A
  seeds: [0, 1]
  batches: 3
  measures: [psnr]
  beside: {attack: dlg}
axes:
  attack.parameters.steps: [2, 3]
"""


def played(folder: Path, name: str) -> Options:
    """A study played in this process, and its files written."""
    path = folder / "studies" / name / "study.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(TEXT, encoding="utf-8")
    study = studies.load(path)
    options = Options(records=folder / "records", results=folder / "results")
    kept = Store(options.records / name)
    for cell in runner.standing(study, options).cells:
        record = run_cell(cell, Here())
        assert record.status in ("complete", "failed"), record.reason
        assert len(record.columns) == (1 if cell.seed == 0 else 0)
        assert Record.from_json(record.to_json()) == record
        kept.append(record)
    assert runner.write(study, options) is not None
    return options


@pytest.mark.usefixtures("cache")
def test_the_first_case_and_seed_are_drawn_across_its_batches(tmp_path: Path) -> None:
    options = played(tmp_path, "blink")
    found = pictures.of_row(options.results, "dlg")
    assert found is not None
    assert (found.said.study, found.said.case) == ("blink", "2")
    assert len(found.said.psnr) == 3 and all(found.said.found)


@pytest.mark.usefixtures("cache")
def test_the_study_of_the_rows_name_goes_before_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "pictures" / "dlg.png"
    played(tmp_path, "blink")
    assert picture.study_of(path) == "blink"
    played(tmp_path, "other")
    assert picture.study_of(path) == "blink"
    played(tmp_path, "dlg")
    assert picture.study_of(path) == "dlg"


def test_what_cannot_be_read_belongs_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert picture.study_of(tmp_path / "x.png") == picture.study_of(tmp_path / "none.png") == ""
