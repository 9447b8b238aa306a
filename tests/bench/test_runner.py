"""A whole study: what is run, kept, resumed, counted, whoever does the work and whatever dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from leakatlas.bench import harness, lanes, runner, store
from leakatlas.bench import study as studies
from leakatlas.bench.cells import Cell, cells_of
from leakatlas.bench.cluster import Elsewhere
from leakatlas.bench.record import Record
from leakatlas.bench.runner import Options
from leakatlas.bench.study import Study
from leakatlas.catalogue import results
from leakatlas.errors import AttackCrashed, InvalidInput
from tests.bench.villains import Villain
from tests.conftest import build_stage

SETUP: dict[str, Any] = {
    "model": {"builtin": "lenet", "kwargs": {"width": 4, "size": 8, "classes": 10}},
    "victims": "patches:8:16",
    "attack": {"key": "inverting_gradients", "parameters": {"steps": 2}},
    "seeds": [0, 1],
    "control": True,
    "measures": ["psnr", "psnr_above_20", "seconds"],
    "beside": {"attack": "inverting_gradients"},
}
FILE = {"schema": "leakatlas/study/1", "title": "Small", "question": "Does it run?",
        "chosen": "nothing", "setup": SETUP}  # fmt: skip


def make(folder: Path, hook: str = "", **changes: Any) -> Study:
    where = folder / "small"
    where.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**FILE, **changes}, sort_keys=False)
    (where / "study.yaml").write_text(text, encoding="utf-8")
    if hook:
        (where / "study.py").write_text(hook, encoding="utf-8")
    return studies.load(where)


def options(folder: Path, **changes: Any) -> Options:
    return replace(
        Options(records=folder / "records", results=folder / "results", trust_code=True), **changes
    )


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.ended: list[tuple[Cell, Record]] = []

    def begun(self, cell: Cell) -> None:
        pass

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        pass

    def done(self, cell: Cell, record: Record) -> None:
        self.ended.append((cell, record))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, Path]]:
    """A small study that one worker has run."""
    folder = tmp_path_factory.mktemp("ran")
    study = make(folder)
    runner.run_study(study, options(folder))
    yield study, folder


def substances(folder: Path) -> dict[str, dict[str, Any]]:
    records = store.Store(folder / "records" / "small").records()
    return {cell: record.substance for cell, record in records.items()}


def test_a_study_leaves_records_and_a_sound_result(ran: tuple[Study, Path]) -> None:
    _, folder = ran
    kept = store.Store(folder / "records" / "small").records()
    assert [r.status for r in kept.values()] == ["complete"] * 2
    assert all(r.process == "own" and r.machine["threads"] == 1 for r in kept.values())
    found, problems = results.read(folder / "results" / "small.json")
    assert problems == []
    (result,) = found
    assert (result.kind, result.key, result.study) == ("attack", "inverting_gradients", "small")
    assert not result.stale and result.seeds == (0, 1)
    names = [measure.name for measure in result.measures]
    assert "psnr" in names and "null baseline other_batch" in names
    psnr = next(m for m in result.measures if m.name == "psnr")
    assert psnr.n == 2 and psnr.interval is not None


def test_a_finished_study_is_not_run_again(ran: tuple[Study, Path]) -> None:
    study, folder = ran
    heard = Heard()
    assert runner.run_study(study, options(folder), heard).left == ()
    assert heard.ended == []


def test_other_code_makes_every_record_stale(
    ran: tuple[Study, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = ran
    monkeypatch.setattr(Cell, "code_hash", "another")
    now = runner.standing(study, options(folder))
    assert now.stale == 2 and len(now.left) == 2


def test_two_workers_leave_the_same_records_bit_for_bit(
    ran: tuple[Study, Path], tmp_path: Path
) -> None:
    study, folder = ran
    runner.run_study(study, options(tmp_path, workers=2))
    assert substances(tmp_path) == substances(folder)


def figures(folder: Path) -> dict[str, tuple[float, Any]]:
    """Every figure of the result file but the times, with its interval."""
    found, _ = results.read(folder / "results" / "small.json")
    return {
        f"{result.key}: {measure.title}": (measure.value, measure.interval)
        for result in found
        for measure in result.measures
        if measure.unit != "s"
    }


def test_the_same_seed_and_command_twice_give_the_same_figures(tmp_path: Path) -> None:
    """Whatever way a study names; the record says which it was."""
    attack = {"key": "inverting_gradients", "parameters": {"steps": 3, "restarts": 2}}
    axes = {"execution": ["eager", "vmap"]}
    setup = {**SETUP, "attack": attack, "control": False, "seeds": [0]}
    for folder in ("once", "again"):
        study = make(tmp_path / folder, setup=setup, axes=axes)
        runner.run_study(study, options(tmp_path / folder))
    once, again = figures(tmp_path / "once"), figures(tmp_path / "again")
    assert once == again and len(once) >= 4
    assert substances(tmp_path / "once") == substances(tmp_path / "again")
    ways = [record["execution"] for record in substances(tmp_path / "once").values()]
    assert sorted(ways) == ["eager", "vmap"]


def with_own(**changes: Any) -> dict[str, Any]:
    return {"setup": {**SETUP, "measures": ["psnr", {"name": "own"}], "control": False, **changes}}


SUICIDE = """
import os, signal

def examine(trial, stage):
    if stage.scenario.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"own": 1.0}
"""


def check_one_error_among_three(folder: Path) -> Record:
    records = store.Store(folder / "records" / "small").records().values()
    by_seed = {record.seed: record for record in records}
    assert {seed: r.status for seed, r in by_seed.items()} == {
        0: "complete", 1: "error", 2: "complete",
    }  # fmt: skip
    dead = by_seed[1]
    assert dead.reason and dead.scores is not None
    assert all(image["candidate"] is None for image in dead.scores["images"])
    content = json.loads((folder / "results" / "small.json").read_text(encoding="utf-8"))
    (case,) = content["cases"]
    assert case["status"] == {"complete": 2, "error": 1}
    psnr = next(m for m in case["measures"] if m["name"] == "psnr")
    assert psnr["n"] == 3  # the dead one counts, as the mean image
    return dead


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """Three cells, one of which kills the process that plays it."""
    folder = tmp_path_factory.mktemp("mortal")
    study = make(folder, hook=SUICIDE, **with_own(seeds=[0, 1, 2]))
    left = runner.run_study(study, options(folder)).left
    assert [cell.seed for cell in left] == [1]  # an error is tried again next time
    return study, folder


def test_a_lane_that_is_killed_costs_its_cell_and_no_other(mortal: tuple[Study, Path]) -> None:
    _, folder = mortal
    dead = check_one_error_among_three(folder)
    assert "SIGKILL" in dead.reason


def test_ray_leaves_the_same_records_and_outlives_killed_processes(
    mortal: tuple[Study, Path], tmp_path: Path
) -> None:
    import ray

    study, folder = mortal
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        runner.run_study(study, options(tmp_path, ray="auto", workers=2))
        dead = check_one_error_among_three(tmp_path)
        there, here = substances(tmp_path), substances(folder)
        del there[dead.cell], here[dead.cell]  # how a process died is told in other words
        assert there == here
        # The process that keeps the attack's child is killed; the next attack finds another.
        cell = next(cells_of(study))
        small = build_stage(model="lenet")
        with pytest.raises(AttackCrashed, match="the attack's process ended"):
            harness.run_trial(small, Villain(deed="orphan"), adversary=Elsewhere(cell))
        found = harness.run_trial(small, Villain(), adversary=Elsewhere(cell)).found
        assert found.status == "complete"
    finally:
        ray.shutdown()


WRONG = """
def examine(trial, stage):
    return {"own": [1.0][stage.scenario.seed]}
"""


def test_a_mistake_in_the_studys_own_code_is_said_and_costs_its_cell_alone(tmp_path: Path) -> None:
    study = make(tmp_path, hook=WRONG, **with_own(seeds=[0, 1]))
    runner.run_study(study, options(tmp_path))
    first, second = store.Store(tmp_path / "records" / "small").records().values()
    assert first.status == "complete" and second.status == "error"
    assert second.reason == (
        "small/study.py, line 3, in examine: IndexError: list index out of range"
    )
    assert second.scores is not None and second.scores["images"][0]["candidate"] is not None


CHOOSES = """
from leakatlas.bench import scene

def choose(cell):
    asked = scene.attack_of(cell.case)
    return asked.variants()["adam, tv 1"].lasting(asked.length)
"""


def test_the_preset_rehearsed_is_what_the_studys_own_file_chooses(tmp_path: Path) -> None:
    attack = {"key": "inverting_gradients", "preset": "rehearsed", "parameters": {"steps": 2}}
    setup = {**SETUP, "attack": attack, "control": False, "seeds": [0]}
    with pytest.raises(InvalidInput, match=r"'rehearsed' takes a choose\.py with `choose\(cell\)`"):
        make(tmp_path / "without", setup=setup)
    study = make(tmp_path, hook=CHOOSES, setup=setup)
    chosen = {**attack, "preset": "published", "parameters": {
        "optimizer": "unsigned", "schedule": "cosine", "steps": 2, "lr": 0.3, "tv_weight": 1.0,
    }}  # fmt: skip
    named = make(tmp_path / "named", setup={**setup, "attack": chosen})
    digests = []
    for each, where in ((study, tmp_path), (named, tmp_path / "named")):
        assert runner.run_study(each, options(where)).left == ()
        (record,) = store.Store(where / "records" / "small").records().values()
        assert record.status == "complete", record.reason
        digests.append(record.found)
    assert digests[0] == digests[1]


def test_a_file_that_chooses_counts_for_who_rehearses_alone(tmp_path: Path) -> None:
    """A study is given one, and its other records keep their names and their code."""
    plain = {"key": "inverting_gradients", "parameters": {"steps": 2}}
    axes = {"adversary": {"fixed": {}, "rehearsed": {"attack": {"preset": "rehearsed"}}}}
    fixed = make(
        tmp_path / "before", setup={**SETUP, "attack": plain}, axes={"adversary": {"fixed": {}}}
    )
    where = tmp_path / "after"
    (where / "small").mkdir(parents=True)
    (where / "small" / "choose.py").write_text(CHOOSES, encoding="utf-8")
    study = make(where, setup={**SETUP, "attack": plain}, axes=axes)
    (before, *_), cells = cells_of(fixed), list(cells_of(study))
    alone, *_ = [cell for cell in cells if cell.label == "fixed"]
    other, *_ = [cell for cell in cells if cell.label == "rehearsed"]
    assert (alone.name, alone.code_hash) == (before.name, before.code_hash)
    assert other.hook == where / "small" / "choose.py" and other.code_hash != alone.code_hash
    with pytest.raises(InvalidInput, match=r"brings Python code .*choose\.py.*--trust-code"):
        runner.run_study(study, replace(options(where), trust_code=False))


PATRICIDE = """
import os, pathlib, signal

def examine(trial, stage):
    mark = pathlib.Path({mark!r})
    if stage.scenario.seed == 1 and mark.exists():
        mark.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    return {{"own": 1.0}}
"""

DRIVER = """
import sys
from pathlib import Path
from leakatlas.bench import runner, study
from leakatlas.bench.runner import Options
folder = Path(sys.argv[1])
options = Options(records=folder / "records", results=folder / "results", trust_code=True)
runner.run_study(study.load(folder / "small"), options)
"""


def test_a_driver_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    make(tmp_path, hook=PATRICIDE.format(mark=str(mark)), **with_own(seeds=[0, 1]))
    run = [sys.executable, "-c", DRIVER, str(tmp_path)]
    assert subprocess.run(run, check=False).returncode == -signal.SIGKILL
    kept = store.Store(tmp_path / "records" / "small").records()
    assert [r.seed for r in kept.values()] == [0]
    assert subprocess.run(run, check=False).returncode == 0
    again = store.Store(tmp_path / "records" / "small").records()
    assert sorted(r.seed for r in again.values()) == [0, 1]
    assert again.keys() > kept.keys() and all(again[name] == kept[name] for name in kept)


def test_a_limit_begins_no_further_cell(tmp_path: Path) -> None:
    study = make(tmp_path)
    after = runner.run_study(study, options(tmp_path, seconds=0.0))
    assert len(after.left) == 2 and not (tmp_path / "results").exists()


def test_an_interrupted_run_loses_only_what_was_running(tmp_path: Path) -> None:
    study = make(tmp_path)

    class Impatient(Heard):
        def done(self, cell: Cell, record: Record) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_study(study, options(tmp_path), Impatient())
    assert len(runner.standing(study, options(tmp_path)).left) == 1
    assert (tmp_path / "results" / "small.json").is_file()


def test_code_of_a_study_from_elsewhere_is_not_run(tmp_path: Path) -> None:
    study = make(tmp_path, hook="raise SystemExit", **with_own())
    with pytest.raises(InvalidInput, match="--trust-code"):
        runner.run_study(study, options(tmp_path, trust_code=False))


def test_a_pattern_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="its cases: main"):
        runner.standing(make(tmp_path), options(tmp_path, only="x*"))


def test_every_case_gets_its_first_cell_before_any_its_second(tmp_path: Path) -> None:
    study = make(tmp_path, axes={"batch": [1, 2]})
    order = [(c.label, c.seed) for c in runner.standing(study, options(tmp_path)).left]
    assert order == [("1", 0), ("2", 0), ("1", 1), ("2", 1)]
    first = runner.standing(study, options(tmp_path, only=["2", "1"])).left
    assert [(c.label, c.seed) for c in first] == [("2", 0), ("2", 1), ("1", 0), ("1", 1)]


def test_a_cell_without_a_working_process_still_has_a_record(tmp_path: Path) -> None:
    cell = next(iter(cells_of(make(tmp_path))))
    record = lanes.blank(cell, "nothing works")
    assert Record.from_json(record.to_json()) == record and record.scores is None
