"""A whole study: what is left to do, who does it, and the result file that follows."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leakatlas import devices
from leakatlas.bench import cluster, figures, lanes, picture, published, store
from leakatlas.bench.cells import Cell, cells_of, rank
from leakatlas.bench.published import Published
from leakatlas.bench.record import FINAL, Record
from leakatlas.bench.store import Store
from leakatlas.bench.study import Study, default_folder
from leakatlas.catalogue import results
from leakatlas.errors import InvalidInput, InvalidParameter, shown

SHOWN = 50
"""Names of cases in an error."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a study is run.

    Args:
        only: Patterns of which the names of its cases must match one; what matches the first is
            run first.
        workers: Processes of this machine.
        ray: Address of a Ray cluster that runs the cells instead.
        device: Where attacks compute, by a name of :func:`leakatlas.devices.chosen`; on a cluster,
            whose machines have other devices than this one, cpu or cuda.
        threads: Threads of every process.
        seconds: No further cell is begun after so long.
        data: Folder of the data sets.
        records: Folder of the records of all studies.
        results: Folder of the result files.
        trust_code: Whether a study from elsewhere may bring Python code.

    Raises:
        UnknownName: If there is no such kind of device.
        InvalidInput: If this machine does not have it.
        InvalidParameter: If a cluster is asked for a device by its number.
    """

    only: str | Sequence[str] | None = None
    workers: int = 1
    ray: str | None = None
    device: str = "cpu"
    threads: int = 1
    seconds: float | None = None
    data: Path = field(default_factory=lambda: data_folder())
    records: Path = field(default_factory=store.default_folder)
    results: Path = field(default_factory=results.default_folder)
    trust_code: bool = False

    def __post_init__(self) -> None:
        if self.ray is None:
            object.__setattr__(self, "device", str(devices.chosen(self.device)))
        elif self.device not in ("cpu", "cuda"):
            raise InvalidParameter(
                f"--ray takes --device cpu or cuda, got {shown(self.device)}: the cluster gives "
                "each attack a GPU of its own."
            )

    def enough(self) -> Callable[[], bool]:
        """Whether the time for beginning cells is over; it begins now."""
        if self.seconds is None:
            return lambda: False
        deadline = time.monotonic() + self.seconds
        return lambda: time.monotonic() >= deadline


def data_folder() -> Path:
    """``$LEAKATLAS_DATA``, else ``../shared/data`` beside the checkout."""
    chosen = os.environ.get("LEAKATLAS_DATA")
    if chosen:
        return Path(chosen)
    return (results.repository_root() or Path.cwd()).parent / "shared" / "data"


@dataclass(frozen=True)
class Standing:
    """How far a study is.

    Args:
        cells: All its cells.
        records: The last record of each that has one.
        left: Cells without a final record of the present code, by the pattern that they match: the
            first of every case, then the second of every case, so that a run which is cut short
            has something of all.
    """

    cells: tuple[Cell, ...]
    records: dict[str, Record]
    left: tuple[Cell, ...]

    @property
    def stale(self) -> int:
        """Cells whose record is of other code."""
        return sum(
            cell.name in self.records and self.records[cell.name].code != cell.code_hash
            for cell in self.cells
        )


def standing(study: Study, options: Options) -> Standing:
    """What a study has and what it lacks."""
    cells = tuple(
        cells_of(
            study,
            only=options.only,
            device=options.device,
            threads=options.threads,
            data=options.data,
        )
    )
    if not cells:
        raise InvalidInput(
            f"Study {study.name!r} has no case that matches {options.only!r}; its cases: "
            f"{', '.join(list(study.cases)[:SHOWN])}{', ...' * (len(study.cases) > SHOWN)}."
        )
    records = Store(options.records / study.name).records()
    counted: Counter[str] = Counter()
    left: list[tuple[tuple[int, int], Cell]] = []
    for cell in cells:
        kept = records.get(cell.name)
        if kept is None or kept.status not in FINAL or kept.code != cell.code_hash:
            place = 0 if options.only is None else rank(cell.label, options.only) or 0
            left.append(((place, counted[cell.label]), cell))
        counted[cell.label] += 1
    left.sort(key=lambda numbered: numbered[0])
    return Standing(cells, records, tuple(cell for _, cell in left))


def run_study(study: Study, options: Options, sink: lanes.Sink | None = None) -> Standing:
    """Run what is left of a study, and write its result file.

    Args:
        study: The study.
        options: How.
        sink: Told about progress.

    Raises:
        InvalidInput: If no case matches, code is not trusted, or a record cannot be written.
    """
    if study.brings and not options.trust_code:
        if study.folder.parent != default_folder().resolve():
            brought = ", ".join(str(study.folder / name) for name in study.brings)
            raise InvalidInput(
                f"Study {study.name!r} brings Python code ({brought}), which would run here. "
                "Read that, and allow it with --trust-code."
            )
    before = standing(study, options)
    kept = Store(options.records / study.name)
    kept.tidy()
    enough = options.enough()
    keeping = _Keeping(kept, sink)
    try:
        if options.ray is None:
            lanes.run(before.left, min(options.workers, len(before.left)), keeping, enough=enough)
        elif before.left:
            cluster.run(before.left, options.ray, keeping, workers=options.workers, enough=enough)
    finally:
        after = standing(study, options)
        write(study, options)
    return after


def write(study: Study, options: Options) -> Path | None:
    """Derive the result file of a study from its records.

    Cases that were published and whose records are not here stand as they were.

    Returns:
        The file; None if there is no record, or if the study sums up all cases and some of them
        were measured elsewhere: the file stays as it was.

    Raises:
        InvalidInput: If it cannot be written, or what is there is no result file.
    """
    now, before = _whole(study, options)
    if before.cases and _sums_up(study):
        return None
    command = f"leakatlas bench {study.name}"
    content = figures.document(study, now.cells, now.records, command, before)
    if content is None:
        return None
    path = options.results / f"{study.name}.json"
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as problem:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InvalidInput(
            f"{path} cannot be written: {problem}. The records behind it are kept in "
            f"{options.records / study.name}; free some space and start the same command again."
        ) from None
    _draw(study, now, options.results / "pictures")
    return path


def elsewhere(study: Study, options: Options) -> str:
    """What is to be said of published cases whose records are not here; empty if there are none."""
    there = _whole(study, options)[1].cases.keys()
    number = len(there)
    if not number:
        return ""
    cases = "1 case whose records are" if number == 1 else f"{number} cases whose records are"
    if _sums_up(study):
        return (
            f"It stays as it was: it sums up {cases} not on this machine. Run these too, or name "
            "another folder with --results."
        )
    said = f"In it, {cases} not on this machine: as published."
    torn = [f"{p.of} - {p.minus}" for p in study.file.compare if len({p.of, p.minus} & there) == 1]
    if torn:  # a difference is paired, cell by cell
        said += f" Left out, until both sides are run here: {', '.join(torn)}."
    return said


def _sums_up(study: Study) -> bool:
    return bool(study.file.summary or study.file.correlate)


def _whole(study: Study, options: Options) -> tuple[Standing, Published]:
    """The study with all its cases, and what stands of its result file."""
    every = Options(
        device=options.device, threads=options.threads, data=options.data, records=options.records
    )
    now = standing(study, every)
    by_case: dict[str, list[Cell]] = {}
    for cell in now.cells:
        by_case.setdefault(cell.label, []).append(cell)
    path = options.results / f"{study.name}.json"
    ended = {name for name, record in now.records.items() if record.status in FINAL}
    return now, published.kept(study, by_case, ended, path)


def _draw(study: Study, now: Standing, folder: Path) -> None:
    """One picture for every attack beside which the study stands, of its first case.

    The study that carries a row's name draws for it; another only where none has.
    """
    first: dict[str, str] = {}
    for label, case in study.cases.items():
        if case.beside is not None and case.beside.attack is not None:
            first.setdefault(case.beside.attack, label)
    for key, label in first.items():
        seed = study.cases[label].seeds[0]
        mine = [c for c in now.cells if (c.label, c.seed) == (label, seed)]
        kept = [now.records[c.name] for c in mine if c.name in now.records]
        shown = [column for record in kept for column in record.columns]
        path = folder / f"{key}.png"
        if shown and (study.name == key or picture.study_of(path) in ("", study.name)):
            picture.save(path, shown, study=study.name, case=label)


class _Keeping:
    """Keeps every record before anybody else hears of it."""

    def __init__(self, kept: Store, sink: lanes.Sink | None) -> None:
        self._kept = kept
        self._sink = sink

    def begun(self, cell: Cell) -> None:
        if self._sink is not None:
            self._sink.begun(cell)

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        if self._sink is not None:
            self._sink.moved(cell, fraction, note)

    def done(self, cell: Cell, record: Record) -> None:
        self._kept.append(record)
        if self._sink is not None:
            self._sink.done(cell, record)
