"""One cell, made again, stands for the others of its case if it comes out equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from leakatlas.bench import lanes, run, runner
from leakatlas.bench.adversary import Here
from leakatlas.bench.cells import Cell
from leakatlas.bench.confirm import confirm
from leakatlas.bench.record import Record
from leakatlas.bench.store import Store
from leakatlas.bench.study import Study
from tests.bench.test_runner import make, options


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, runner.Options]:
    """Two cells of one case, made by old code in this process."""

    def here(
        cells: Sequence[Cell], workers: int, sink: lanes.Sink, *, enough: Callable[[], bool]
    ) -> None:
        for cell in cells:
            if not enough():
                sink.done(cell, run.run_cell(cell, Here()))

    monkeypatch.setattr(lanes, "run", here)
    study, given = make(tmp_path), options(tmp_path)
    monkeypatch.setattr(Cell, "code_hash", "old")
    runner.run_study(study, given)
    monkeypatch.setattr(Cell, "code_hash", "new")
    return study, given


def records(study: Study, given: runner.Options) -> dict[int, Record]:
    return {r.seed: r for r in Store(given.records / study.name).records().values()}


def test_an_equal_cell_confirms_its_case(ran: tuple[Study, runner.Options]) -> None:
    study, given = ran
    assert runner.standing(study, given).stale == 2
    assert confirm(study, given).equal == ["main"]
    assert not runner.standing(study, given).stale
    made, old = records(study, given)[0], records(study, given)[1]
    assert (made.code, made.confirmed) == ("new", "") and (old.code, old.confirmed) == (
        "new",
        "old",
    )
    told = (given.results / "small.json").read_text(encoding="utf-8")
    assert "1 of 2 cell stands from earlier code" in told


def test_a_cell_that_differs_confirms_nothing(ran: tuple[Study, runner.Options]) -> None:
    study, given = ran
    kept = Store(given.records / study.name)
    kept.append(replace(records(study, given)[0], found="something else"))
    assert confirm(study, given).apart == ["main"]
    assert runner.standing(study, given).stale == 1
    assert records(study, given)[1].code == "old"


def test_without_time_nothing_is_confirmed(ran: tuple[Study, runner.Options]) -> None:
    study, given = ran
    assert confirm(study, replace(given, seconds=0.0)).left == ["main"]
    assert runner.standing(study, given).stale == 2


def test_a_confirmed_record_remembers_its_maker(
    ran: tuple[Study, runner.Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, given = ran
    confirm(study, given)
    monkeypatch.setattr(Cell, "code_hash", "newer")
    assert confirm(study, given).equal == ["main"]
    assert records(study, given)[1].confirmed == "old"
