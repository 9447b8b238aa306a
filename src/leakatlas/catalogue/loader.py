"""Reading and checking the rows.

The shipped files are read once and must be without fault; :func:`check_files` reads any others
and returns every problem at once.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from leakatlas.errors import CatalogueError, UnknownName

if TYPE_CHECKING:
    from leakatlas.catalogue.problems import Problem
    from leakatlas.catalogue.schema import Attack, Catalogue, Defense, Reference, Row, ThreatModel

T = TypeVar("T")

FILES = {
    "threat_model": "threat_models.toml",
    "attack": "attacks.toml",
    "defense": "defenses.toml",
    "reference": "references.toml",
}


def threat_models() -> tuple[ThreatModel, ...]:
    """The eight threat models, A to H."""
    return _shipped().threat_model


def attacks() -> tuple[Attack, ...]:
    """The attack rows, in the order of the table."""
    return _shipped().attack


def defenses() -> tuple[Defense, ...]:
    """The defense rows, in the order of the table."""
    return _shipped().defense


def references() -> tuple[Reference, ...]:
    """The works, by number."""
    return _shipped().reference


def threat_model(letter: str) -> ThreatModel:
    """The threat model with this letter.

    Raises:
        UnknownName: If there is none.
    """
    rows: dict[str, ThreatModel] = {row.letter: row for row in threat_models()}
    return _find("threat model", letter.strip().upper(), rows)


def attack(key: str) -> Attack:
    """The attack row with this key, alias or number (``"dlg"``, ``"CPA"``, ``"8"``).

    Raises:
        UnknownName: If there is none, with the nearest names.
    """
    by_name = {row.key: row for row in attacks()}
    for row in attacks():
        for name in (row.name, *row.aliases, str(row.number), f"[{row.number}]"):
            by_name.setdefault(name.casefold(), row)
    return _find("attack", key, by_name, [row.key for row in attacks()])


def defense(key: str) -> Defense:
    """The defense row with this key or alias.

    Raises:
        UnknownName: If there is none, with the nearest names.
    """
    by_name = {row.key: row for row in defenses()}
    for row in defenses():
        for name in (row.name, *row.aliases):
            by_name.setdefault(name.casefold(), row)
    return _find("defense", key, by_name, [row.key for row in defenses()])


def reference(number: int) -> Reference:
    """The work with this number.

    Raises:
        UnknownName: If there is none.
    """
    return _find("reference", str(number), {str(row.number): row for row in references()})


def _find(kind: str, name: str, rows: dict[str, T], shown: Iterable[str] | None = None) -> T:
    try:
        return rows[name] if name in rows else rows[name.casefold()]
    except KeyError:
        raise UnknownName(kind, name, rows if shown is None else shown) from None


def shipped_text(kind: str) -> str:
    """The text of one of the shipped files."""
    return (Path(__file__).parent / FILES[kind]).read_text(encoding="utf-8")


@functools.cache
def _shipped() -> Catalogue:
    texts = {name: shipped_text(kind) for kind, name in FILES.items()}
    catalogue, problems = check_texts(texts)
    if problems:
        raise CatalogueError("\n".join(map(str, problems)))
    return catalogue


def check_files(paths: Sequence[Path]) -> tuple[Catalogue, list[Problem]]:
    """The shipped catalogue with these files added, and everything that is wrong with them.

    A file named like a shipped one (``attacks.toml``) stands in its place; any other is added to
    the catalogue, so that a single new row can be checked before it moves in.
    """
    texts = {name: shipped_text(kind) for kind, name in FILES.items()}
    for path in paths:
        texts[path.name if path.name in texts else str(path)] = path.read_text(encoding="utf-8")
    return check_texts(texts)


def check_texts(texts: dict[str, str]) -> tuple[Catalogue, list[Problem]]:
    """The rows of these TOML texts by file name, and every problem with them."""
    # Imported here: pydantic costs more than the rest of the package, and `--help` needs no rows.
    from leakatlas.catalogue.checks import cross_check
    from leakatlas.catalogue.schema import ROW_TYPES, Catalogue

    problems: list[Problem] = []
    rows: dict[str, list[Row]] = {kind: [] for kind in ROW_TYPES}
    origins: dict[int, tuple[str, str]] = {}
    declared: set[int] = set()  # also by rows that are refused: one mistake, one message
    for file, text in texts.items():
        for kind, entry, raw in _tables(file, text, problems):
            if kind == "reference" and isinstance(raw.get("number"), int):
                declared.add(raw["number"])
            row = _row(kind, raw, file, entry, problems)
            if row is not None:
                rows[kind].append(row)
                origins[id(row)] = (file, label(kind, raw, entry))
    sound: dict[str, Any] = {kind: tuple(found) for kind, found in rows.items()}
    catalogue = Catalogue.model_construct(**sound)
    problems += cross_check(catalogue, origins, declared)
    return catalogue, problems


def label(kind: str, raw: dict[str, Any], entry: int) -> str:
    """How a row is named in messages: by letter, number or key, else by its place."""
    for name in ("letter", "number" if kind == "reference" else "key"):
        if isinstance(raw.get(name), (str, int)):
            return f'{kind} "{raw[name]}"'
    return f"{kind} (entry {entry})"


def _tables(
    file: str, text: str, problems: list[Problem]
) -> Iterable[tuple[str, int, dict[str, Any]]]:
    from leakatlas.catalogue.problems import Problem, closest

    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(
            Problem(
                file=file,
                message=f"is no valid TOML: {error}.",
                fix="repair that line; text stands in quotes, a row begins with [[attack]].",
            )
        )
        return
    for kind, entries in data.items():
        if kind not in FILES:
            problems.append(
                Problem(
                    file=file,
                    row=kind,
                    message="is no kind of row.",
                    fix=f"begin the row with [[name]], {closest(kind, FILES)}",
                )
            )
        elif not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            problems.append(
                Problem(
                    file=file,
                    row=kind,
                    message="is not a list of rows.",
                    fix=f"begin each row with [[{kind}]], in double brackets.",
                )
            )
        else:
            for number, raw in enumerate(entries, 1):
                yield kind, number, raw


def _row(
    kind: str, raw: dict[str, Any], file: str, entry: int, problems: list[Problem]
) -> Row | None:
    from pydantic import ValidationError

    from leakatlas.catalogue.problems import from_validation
    from leakatlas.catalogue.schema import ROW_TYPES

    model = ROW_TYPES[kind]
    try:
        return model.model_validate(raw)
    except ValidationError as failure:
        problems += from_validation(failure, model, file=file, row=label(kind, raw, entry))
        return None
