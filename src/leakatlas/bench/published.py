"""Figures that a result file holds and the records of this machine do not: measured elsewhere.

Records stay where they were made; result files travel with the repository. Whoever adds a case to a
study, or runs some of its cases, must not lose what others measured.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leakatlas import reading
from leakatlas.bench.cells import SAID_ABOUT, Cell, setup
from leakatlas.bench.record import FINAL
from leakatlas.bench.study import Study
from leakatlas.errors import InvalidInput


@dataclass(frozen=True)
class Published:
    """What stands of an earlier result file.

    Args:
        document: The whole file; empty if there is none.
        cases: Its cases that stand, by name: the study still has them, set up alike, and fewer of
            their cells have ended here than were published.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    cases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def together(self, name: str, here: list[Any]) -> list[Any]:
        """A list of the file's head with what it says of the cases that stand, each thing once."""
        before = self.document.get(name, []) if self.cases else []
        return [*here, *(one for one in before if one not in here)]


def kept(
    study: Study, cells: Mapping[str, list[Cell]], done: Collection[str], path: Path
) -> Published:
    """What of a result file must be kept.

    Args:
        study: Of this checkout.
        cells: Its cells, by case.
        done: Names of those that have ended here.
        path: The file; there may be none.

    Raises:
        InvalidInput: If it is no result file: it is not written over.
    """
    if not reading.is_file(path):
        return Published()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        by_name = {case["case"]: case for case in document["cases"]}
        stand = {
            name: case
            for name, case in by_name.items()
            if name in cells
            and _as_set_up(case["setup"]) == _as_set_up(setup(study.cases[name]))
            and sum(c.name in done for c in cells[name]) < _ended(case["status"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InvalidInput(
            f"{path} is no result file that could be added to ({type(problem).__name__}: "
            f"{problem}). Move it away, or name another folder with --results."
        ) from None
    return Published(document, stand)


def _ended(status: Mapping[str, int]) -> int:
    """How many cells of a published case have ended for good."""
    return sum(number for name, number in status.items() if name in FINAL)


def _as_set_up(values: Mapping[str, Any]) -> Any:
    """A set-up as JSON, without what is only said of it and keys that are not used."""
    plain = {k: v for k, v in values.items() if k not in SAID_ABOUT and v is not None}
    return json.loads(json.dumps(plain))
