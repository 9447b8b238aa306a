"""Records on disk: written whole or not at all, whatever happens to the disk."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from leakatlas.bench import runner
from leakatlas.bench import study as studies
from leakatlas.bench.record import Record
from leakatlas.bench.runner import Options
from leakatlas.bench.store import MOST_PARTS, Store
from leakatlas.cli import app
from leakatlas.cli.codes import BAD_INPUT
from leakatlas.errors import InvalidInput


def record(number: int) -> Record:
    return Record(
        cell=f"{number}", code="c", study="s", label="main", seed=number, batch=0,
        status="complete", recipe={}, own={"ballast": [float(i) for i in range(2_000)]},
    )  # fmt: skip


def kept(folder: Path) -> list[str]:
    return sorted(Store(folder).records(), key=int)


def test_a_full_disk_is_said_and_what_was_kept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.append(record(0))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda file: _no_room())
        with pytest.raises(InvalidInput, match=r"No space left.*untouched"):
            store.append(record(1))
    assert kept(tmp_path) == ["0"] and not list(tmp_path.glob("*.partial"))
    store.append(record(1))
    assert kept(tmp_path) == ["0", "1"]


def test_parts_are_removed_only_once_they_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    for number in range(MOST_PARTS + 1):
        store.append(record(number))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda file: _no_room())
        with pytest.raises(InvalidInput, match="No space left"):
            store.tidy()
    assert len(kept(tmp_path)) == MOST_PARTS + 1
    store.tidy()
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert len(kept(tmp_path)) == MOST_PARTS + 1


def test_merging_keeps_of_every_cell_the_last_record_alone(tmp_path: Path) -> None:
    """Two runs that merged at a time had doubled a store, and the next two had again."""
    store = Store(tmp_path)
    for number in [*range(MOST_PARTS), 0]:
        store.append(record(number))
    for part in tmp_path.glob("*.parquet"):
        part.with_name(f"another-{part.name}").write_bytes(part.read_bytes())
    store.tidy()
    (part,) = tmp_path.glob("*.parquet")
    assert pq.ParquetFile(part).metadata.num_rows == MOST_PARTS
    assert kept(tmp_path) == [str(number) for number in range(MOST_PARTS)]


def _no_room() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    Store(tmp_path).append(record(0))
    (part,) = tmp_path.glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InvalidInput, match=f"{part.name}.*remove it"):
        Store(tmp_path).records()


# -- a disk that is really full ------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB of their own, where this user may mount them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if made.returncode:
        pytest.skip(f"no small disk can be mounted: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


STUDY = """
schema: leakatlas/study/1
title: Three large records
question: What does a full disk lose?
chosen: nothing
setup: {model: fc, victims: "photos:8", seeds: [0, 1, 2], measures: [{name: ballast}]}
"""
HOOK = """
import random

def measure(cell):
    draw = random.Random(cell.seed)
    return {"ballast": [draw.random() for _ in range(12_000)]}
"""


def test_a_study_on_a_full_disk_loses_nothing_and_goes_on(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "large"
    home.mkdir()
    (home / "study.yaml").write_text(STUDY, encoding="utf-8")
    (home / "study.py").write_text(HOOK, encoding="utf-8")
    monkeypatch.setenv("LEAKATLAS_CACHE", str(small_disk))
    command = ["bench", str(home), "--trust-code", "--results", str(tmp_path / "results")]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == BAD_INPUT
    assert "No space left" in ended.output and "free some space" in ended.output
    records = small_disk / "studies" / "large"
    before = Store(records).records()
    assert 0 < len(before) < 3 and not list(records.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert CliRunner().invoke(app, command).exit_code == 0
    after = Store(records).records()
    assert len(after) == 3 and all(after[cell] == before[cell] for cell in before)


def test_a_result_that_cannot_be_written_leaves_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "large"
    home.mkdir()
    (home / "study.yaml").write_text(STUDY, encoding="utf-8")
    (home / "study.py").write_text(HOOK, encoding="utf-8")
    options = Options(records=tmp_path / "records", results=tmp_path / "results")
    study = studies.load(home)
    for cell in runner.standing(study, options).cells:
        Store(options.records / "large").append(
            Record(
                cell=cell.name, code=cell.code_hash, study="large", label="main", seed=cell.seed,
                batch=0, status="complete", recipe={}, own={"ballast": [1.0]},
                started="2026-01-01T00:00:00+00:00",
            )
        )  # fmt: skip
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", lambda *paths: _no_room())
        with pytest.raises(InvalidInput, match=r"cannot be written.*are kept in"):
            runner.write(study, options)
    assert not list((tmp_path / "results").iterdir())
    assert runner.write(study, options) is not None
