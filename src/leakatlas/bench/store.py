"""Records on disk: Parquet parts, each written whole or not at all, merged now and then.

A record is a part of its own as soon as its cell has ended, so a kill loses nothing that was
finished. Of several records of one cell the last one counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from leakatlas import sealed
from leakatlas.attacks.api import cache_folder
from leakatlas.bench.record import Record
from leakatlas.errors import InvalidInput, needing

MOST_PARTS = 64
"""Parts that are left alone; more are merged when a store is next written to."""

_TEXTS = ("cell", "code", "study", "label", "status", "started", "record")
"""What one may want to select by, and the whole record as JSON; ``order`` stands beside them."""


def default_folder() -> Path:
    """Where the records of all studies are kept."""
    return cache_folder() / "studies"


class Store:
    """The records of one study.

    Args:
        folder: Of this study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, record: Record) -> None:
        """Keep a record.

        Raises:
            InvalidInput: If it cannot be written (disk full); nothing kept before is touched.
        """
        self._write([(time.time_ns(), record)])

    def records(self) -> dict[str, Record]:
        """The last record of every cell, by its name.

        Raises:
            InvalidInput: If a part cannot be read; the message names it.
        """
        return {cell: record for cell, (_, record) in self._last(self._parts()).items()}

    def tidy(self) -> None:
        """Merge many parts into one, of every cell its last record.

        A kill meanwhile, or another run that merges too, leaves some twice: the next time mends it.
        """
        for remains in self.folder.glob("*.partial"):
            remains.unlink(missing_ok=True)
        parts = self._parts()
        if len(parts) > MOST_PARTS:
            self._write(list(self._last(parts).values()))
            for part in parts:
                part.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _last(self, parts: Iterable[Path]) -> dict[str, tuple[int, Record]]:
        last: dict[str, tuple[int, Record]] = {}
        for order, record in self._all(parts):
            if record.cell not in last or last[record.cell][0] <= order:
                last[record.cell] = (order, record)
        return last

    def _all(self, parts: Iterable[Path]) -> Iterable[tuple[int, Record]]:
        with needing("the store of records", "pyarrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        for part in parts:
            try:
                table = pq.read_table(part, columns=["order", "record"])
                rows = table.to_pylist()
                found = [(row["order"], Record.from_json(json.loads(row["record"])))
                         for row in rows]  # fmt: skip
            except FileNotFoundError:
                continue  # merged by another run meanwhile; its records are in a newer part
            except (pa.ArrowException, OSError, *sealed.MALFORMED) as problem:
                words = " ".join(str(problem).split())[:300]
                raise InvalidInput(
                    f"{part} is damaged ({words}); remove it, and its cells are run again."
                ) from None
            yield from found

    def _write(self, records: list[tuple[int, Record]]) -> None:
        with needing("the store of records", "pyarrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        rows = [
            {
                "cell": record.cell,
                "code": record.code,
                "study": record.study,
                "label": record.label,
                "status": record.status,
                "started": record.started,
                "order": order,
                "record": json.dumps(record.to_json()),
            }
            for order, record in records
        ]
        columns = pa.schema([*((n, pa.string()) for n in _TEXTS), ("order", pa.int64())])
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
        partial = self.folder / f"{name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                pq.write_table(pa.Table.from_pylist(rows, schema=columns), file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(partial.with_suffix(".parquet"))
        except OSError as problem:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise InvalidInput(
                f"A record cannot be kept in {self.folder}: {problem}. What was kept before is "
                "untouched; free some space and start the same command again."
            ) from None
