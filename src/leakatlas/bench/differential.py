"""Our figures held against those of official code, on equal inputs made from seeds.

The official figures are data in ``results/differential``, each with repository, commit and
tolerance; ours are computed anew by ``studies/differential/ours.py``. No official code is needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from leakatlas.bench.study import default_folder
from leakatlas.catalogue import results
from leakatlas.catalogue.measured import Differential
from leakatlas.errors import InvalidInput, UnknownName

FILE = Path("differential", "ours.py")

Ours = Mapping[str, Callable[[], Mapping[str, float]]]


@dataclass(frozen=True)
class Comparison:
    """One figure of both sides.

    Args:
        row: The row.
        name: What was compared.
        official: The official value.
        ours: Our value, computed now.
        tolerance: Largest relative difference that counts as equal.
    """

    row: str
    name: str
    official: float
    ours: float
    tolerance: float

    @property
    def difference(self) -> float:
        """Relative to the official value."""
        return abs(self.ours - self.official) / abs(self.official)

    @property
    def equal(self) -> bool:
        """Whether the two agree; a figure that is no number never does."""
        return self.difference <= self.tolerance


def stored(folder: Path | None = None) -> dict[str, Differential]:
    """What is known of the official side, by row.

    Raises:
        InvalidInput: If a file is malformed.
    """
    found = {}
    for path in sorted(((folder or results.default_folder()) / "differential").glob("*.json")):
        differential = results.differential(path)
        found[differential.key] = differential
    return found


def ours(folder: Path | None = None) -> Ours:
    """Our side of the rows whose comparison can be made again.

    Raises:
        InvalidInput: If the checkout's file is missing.
    """
    path = (folder or default_folder()) / FILE
    spec = importlib.util.spec_from_file_location("leakatlas_differential", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidInput(f"There is no {path}; comparisons are made in a checkout of LeakAtlas.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Ours = module.OURS
    return found


def compare(row: str, known: Mapping[str, Differential], mine: Ours) -> list[Comparison]:
    """Both sides of a row; empty if its official figures cannot be compared again.

    Raises:
        UnknownName: If there is no differential of that row.
        InvalidInput: If the two sides name different figures.
    """
    if row not in known:
        raise UnknownName("differential", row, known)
    official = known[row].official
    if not official:
        return []
    computed = dict(mine[row]()) if row in mine else {}
    if computed.keys() != official.keys():
        raise InvalidInput(
            f"Differential {row!r}: the official side has {sorted(official)}, ours gives "
            f"{sorted(computed)}; mend {FILE}."
        )
    return [
        Comparison(row, name, figure.value, float(computed[name]), figure.tolerance)
        for name, figure in official.items()
    ]
