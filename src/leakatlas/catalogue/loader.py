"""Reading and checking the rows.

Four files hold the systematization, one a kind of row; every work that LeakAtlas adds is a file of
its own in ``added/``, with its reference. They are read once and must be without fault;
:func:`check_files` reads any others and returns every problem at once.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from leakatlas import limits, reading
from leakatlas.errors import CatalogueError, UnknownName

if TYPE_CHECKING:
    from leakatlas.catalogue.checks import Draft
    from leakatlas.catalogue.problems import Problem
    from leakatlas.catalogue.schema import Attack, Catalogue, Defense, Reference, Row, ThreatModel

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
FILES = {
    "threat_model": "threat_models.toml",
    "attack": "attacks.toml",
    "defense": "defenses.toml",
    "reference": "references.toml",
}
ADDED = "added"
"""Folder of the works that the systematization lacks, beside its four files."""


def threat_models() -> tuple[ThreatModel, ...]:
    """The eight threat models, A to H."""
    return _shelf().rows.threat_model


def attacks() -> tuple[Attack, ...]:
    """The attacks: the published rows in the order of the table, then what was added."""
    return _shelf().rows.attack


def defenses() -> tuple[Defense, ...]:
    """The defenses: the published rows in the order of the table, then what was added."""
    return _shelf().rows.defense


def references() -> tuple[Reference, ...]:
    """The works: the printed ones by number, then what was added."""
    return _shelf().rows.reference


def printed_number(row: Attack) -> int | None:
    """The number of an attack in the published table, or None for an added one.

    The table numbers its attacks by their references.
    """
    return reference(row.reference).number if row.origin == "published" else None


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
    return _find("attack", key, _shelf().attacks, [row.key for row in attacks()])


def defense(key: str) -> Defense:
    """The defense row with this key or alias.

    Raises:
        UnknownName: If there is none, with the nearest names.
    """
    return _find("defense", key, _shelf().defenses, [row.key for row in defenses()])


def reference(name: str) -> Reference:
    """The work with this key or printed number (``"zhu2019deep"``, ``"1"``, ``"[1]"``).

    Raises:
        UnknownName: If there is none, with the nearest keys.
    """
    return _find("reference", name, _shelf().references, [row.key for row in references()])


def _find(kind: str, name: str, rows: dict[str, T], shown: Iterable[str] | None = None) -> T:
    try:
        return rows[name] if name in rows else rows[name.casefold()]
    except KeyError:
        raise UnknownName(kind, name, rows if shown is None else shown) from None


def shipped_texts() -> dict[str, str]:
    """The text of every shipped file by its path in the catalogue; the four tables come first."""
    names = [*FILES.values(), *sorted(f"{ADDED}/{p.name}" for p in (HERE / ADDED).glob("*.toml"))]
    return {name: (HERE / name).read_text(encoding="utf-8") for name in names}


@dataclass(frozen=True)
class _Shelf:
    """The shipped rows, and every name by which they are found."""

    rows: Catalogue
    attacks: dict[str, Attack]
    defenses: dict[str, Defense]
    references: dict[str, Reference]


@functools.cache
def _shelf() -> _Shelf:
    catalogue, problems = check_texts(shipped_texts())
    if problems:
        raise CatalogueError("\n".join(map(str, problems)))
    references: dict[str, Reference] = {}
    for work in catalogue.reference:
        references[work.key] = work
        if work.number is not None:
            references[str(work.number)] = references[f"[{work.number}]"] = work
    by_name: dict[str, Attack] = {row.key: row for row in catalogue.attack}
    for row in catalogue.attack:
        number = references[row.reference].number if row.origin == "published" else None
        numbered = () if number is None else (str(number), f"[{number}]")
        for name in (row.name, *row.aliases, *numbered):
            by_name.setdefault(name.casefold(), row)
    defenses: dict[str, Defense] = {row.key: row for row in catalogue.defense}
    for held in catalogue.defense:
        for name in (held.name, *held.aliases):
            defenses.setdefault(name.casefold(), held)
    return _Shelf(catalogue, by_name, defenses, references)


def check_files(paths: Sequence[Path]) -> tuple[Catalogue, list[Problem]]:
    """The shipped catalogue with these files added, and everything that is wrong with them.

    Rows are checked one by one, against each other, and against the modules of this copy.
    A file that lies in the catalogue, or is named like one of the four (``attacks.toml``), stands
    in its place; any other is added, so that a new row can be checked before it moves in.
    """
    from leakatlas.catalogue import code_checks

    texts = shipped_texts()
    for path in paths:
        texts[_place(path)] = reading.read_text(path, what="file of rows", limit=limits.ROWS)
    drafts, problems = read_texts(texts)
    return _sound(drafts), problems + code_checks.check(drafts)


def _place(path: Path) -> str:
    """The name under which a file is checked."""
    if path.resolve().is_relative_to(HERE):
        return path.resolve().relative_to(HERE).as_posix()
    return path.name if path.name in FILES.values() else str(path)


def check_texts(texts: dict[str, str]) -> tuple[Catalogue, list[Problem]]:
    """The rows of these TOML texts by file name, and every problem with them."""
    drafts, problems = read_texts(texts)
    return _sound(drafts), problems


def read_texts(texts: dict[str, str]) -> tuple[list[Draft], list[Problem]]:
    """The rows of these TOML texts as far as they are understood, and every problem with them."""
    # Imported here: pydantic costs more than the rest of the package, and `--help` needs no rows.
    from leakatlas.catalogue.checks import cross_check

    problems: list[Problem] = []
    drafts: list[Draft] = []
    for file, text in texts.items():
        for kind, entry, raw in _tables(file, text, problems):
            drafts.append(_draft(kind, raw, file, entry, problems))
    return drafts, problems + cross_check(drafts)


def _sound(drafts: list[Draft]) -> Catalogue:
    from leakatlas.catalogue.schema import ROW_TYPES, Catalogue

    rows: dict[str, Any] = {
        kind: tuple(d.row for d in drafts if d.kind == kind and d.row is not None)
        for kind in ROW_TYPES
    }
    return Catalogue.model_construct(**rows)


def label(kind: str, raw: dict[str, Any], entry: int) -> str:
    """How a row is named in messages: by letter or key, else by its place."""
    for name in ("letter", "key"):
        if isinstance(raw.get(name), str):
            return f'{kind} "{raw[name]}"'
    return f"{kind} (entry {entry})"


@functools.cache
def _parsed(text: str) -> dict[str, Any]:
    return tomllib.loads(text)  # read, never changed


def _tables(
    file: str, text: str, problems: list[Problem]
) -> Iterable[tuple[str, int, dict[str, Any]]]:
    from leakatlas.catalogue.problems import Problem, closest

    try:
        data = _parsed(text)
    # Besides bad TOML: nested too deep, and whole numbers of thousands of digits.
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
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


def _draft(kind: str, raw: dict[str, Any], file: str, entry: int, problems: list[Problem]) -> Draft:
    from pydantic import ValidationError

    from leakatlas.catalogue.checks import Draft, sound_fields
    from leakatlas.catalogue.problems import from_validation
    from leakatlas.catalogue.schema import ROW_TYPES

    model = ROW_TYPES[kind]
    name = label(kind, raw, entry)
    row: Row | None = None
    try:
        row = model.model_validate(raw)
        fields = {field: getattr(row, field) for field in model.model_fields}
    except ValidationError as failure:
        problems += from_validation(failure, model, file=file, row=name)
        fields = sound_fields(model, raw)
    return Draft(kind=kind, file=file, label=name, model=model, fields=fields, row=row)
