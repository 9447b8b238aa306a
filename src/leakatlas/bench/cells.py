"""Cells: one case, one seed, one batch; named by the hash of all that decides what comes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from leakatlas.bench.schema import Case, OwnMeasure
from leakatlas.bench.study import Study
from leakatlas.catalogue import code

SAID_ABOUT = {"measures", "beside", "note", "seeds", "batches", "memory", "time"}
"""Keys of a case that change what is said of a cell, or whether it survives, but not its figures.

``batches`` counts the cells of a case; which images a cell attacks is in its own batch number.
"""

LATER = ("utility", "labelling", "classes_a_client")
"""Keys that studies have had since some records were made: not used, they change no name."""


def setup(case: Case) -> dict[str, Any]:
    """A case as JSON without what is said of it, and who gives the measures that it describes."""
    plain = case.model_dump(mode="json", exclude={"measures", "beside"})
    described = {m.computes for m in case.measures if isinstance(m, OwnMeasure)}
    return plain | ({"described": sorted(described)} if described else {})


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    Args:
        study: Name of its study.
        label: Name of its case.
        case: The set-up.
        seed: Seed of networks, noise and attack.
        batch: Which batch of the victims, from 0.
        device: Where attacks compute; their victims compute on the CPU, so that every device
            attacks the same bits. Where nobody attacks, clients and server compute there.
        threads: Threads of every process.
        hook: The Python file of the study that it runs, if any.
        data: Folder that relative paths of data start from.
    """

    study: str
    label: str
    case: Case
    seed: int
    batch: int
    device: str = "cpu"
    threads: int = 1
    hook: Path | None = None
    data: Path = Path()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {
            "study": self.study,
            "label": self.label,
            "case": self.case.model_dump(mode="json"),
            "seed": self.seed,
            "batch": self.batch,
            "device": self.device,
            "threads": self.threads,
            "hook": None if self.hook is None else str(self.hook.resolve()),
            "data": str(self.data.resolve()),
            "code_hash": self.code_hash,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Cell:
        """The cell whose :meth:`to_json` is ``values``."""
        plain = dict(values)
        plain["case"] = Case.model_validate(plain["case"])
        plain["hook"] = None if plain["hook"] is None else Path(plain["hook"])
        plain["data"] = Path(plain["data"])
        code_hash = plain.pop("code_hash")
        cell = cls(**plain)
        # As it was when the study began: files may change while it runs.
        vars(cell)["code_hash"] = code_hash
        return cell

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """All that decides what comes out, code and machine left out."""
        unused = {key for key in LATER if getattr(self.case, key) is None}
        return {
            "case": self.case.model_dump(mode="json", exclude=SAID_ABOUT | unused),
            "seed": self.seed,
            "batch": self.batch,
            "device": self.device.partition(":")[0],
            "threads": self.threads,
            "own": self.hook is not None,
            # A measurement of the study's own may depend on which study it is; the rules of
            # `labelling` are its measures.
            **({"study": self.study, "label": self.label} if self.case.attack is None else {}),
            **(
                {}
                if self.case.labelling is None
                else {"rules": [m.computes for m in self.case.measures if not isinstance(m, str)]}
            ),
        }

    @cached_property
    def name(self) -> str:
        """The content hash, shortened to 24 characters."""
        text = json.dumps(self.recipe, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @cached_property
    def code_hash(self) -> str:
        """Hash of the code that it runs."""
        return code.of_case(setup(self.case), self.hook)


def cells_of(
    study: Study,
    *,
    only: str | Sequence[str] | None = None,
    device: str = "cpu",
    threads: int = 1,
    data: Path = Path(),
) -> Iterator[Cell]:
    """The cells of a study, case by case.

    Args:
        study: The study.
        only: Patterns of which the name of a case must match one (``*`` and ``?`` allowed).
        device: Where attacks compute.
        threads: Threads of every process.
        data: Folder that relative paths of data start from.
    """
    for label, case in study.cases.items():
        if only is not None and rank(label, only) is None:
            continue
        own = study.code_of(case)
        for position, seed in enumerate(case.seeds):
            batches = [position] if case.batches == "one a seed" else range(case.batches)
            for batch in batches:
                yield Cell(study.name, label, case, seed, batch, device, threads, own, data)


def rank(label: str, only: str | Sequence[str]) -> int | None:
    """The place of the first pattern that a case's name matches; None if it matches none."""
    patterns = [only] if isinstance(only, str) else only
    return next((n for n, pattern in enumerate(patterns) if fnmatchcase(label, pattern)), None)
