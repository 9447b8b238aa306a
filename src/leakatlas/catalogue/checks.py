"""What one field cannot tell: rows that contradict each other or themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from leakatlas.catalogue.problems import Problem, closest, toml
from leakatlas.catalogue.schema import (
    ATTACK_TECHNIQUES,
    DEFENSE_TECHNIQUES,
    Attack,
    Catalogue,
    Code,
    Defense,
    Reference,
    Row,
    ThreatModel,
    Unit,
)

R = TypeVar("R", bound=Row)

# A finding: (field, message, fix).
Finding = tuple[str, str, str]


def cross_check(
    catalogue: Catalogue, origins: dict[int, tuple[str, str]], numbers: set[int]
) -> list[Problem]:
    """Every contradiction within and between rows.

    Args:
        catalogue: All rows.
        origins: File and label of each row, by ``id``.
        numbers: The references that exist.
    """
    attack_numbers = {row.number for row in catalogue.attack}
    problems: list[Problem] = []

    def report(row: Row, findings: Iterator[Finding]) -> None:
        file, label = origins[id(row)]
        problems.extend(
            Problem(file=file, row=label, field=field, message=message, fix=fix)
            for field, message, fix in findings
        )

    for threat in catalogue.threat_model:
        report(threat, _threat_model(threat))
    for attack in catalogue.attack:
        report(attack, _attack(attack, numbers, attack_numbers))
    for defense in catalogue.defense:
        report(defense, _defense(defense, numbers))
    for reference in catalogue.reference:
        report(reference, _reference(reference))
    every: tuple[Row, ...] = (
        *catalogue.threat_model,
        *catalogue.attack,
        *catalogue.defense,
        *catalogue.reference,
    )
    for row in every:
        report(row, _corrections(row))
    rows: tuple[Unit, ...] = (*catalogue.attack, *catalogue.defense)
    problems += _duplicates(rows, "key", lambda row: row.key, origins)
    problems += _duplicates(catalogue.attack, "number", lambda row: row.number, origins)
    problems += _duplicates(catalogue.threat_model, "letter", lambda row: row.letter, origins)
    problems += _duplicates(catalogue.reference, "number", lambda row: row.number, origins)
    problems += _duplicates(catalogue.reference, "key", lambda row: row.key, origins)
    return problems


def _threat_model(row: ThreatModel) -> Iterator[Finding]:
    if "updates" not in row.knowledge:
        yield "knowledge", "lacks 'updates'.", 'add "updates": without them there is no attack.'
    if len(set(row.knowledge)) < len(row.knowledge):
        yield "knowledge", "names something twice.", "name each kind of knowledge once."


def _attack(row: Attack, numbers: set[int], attack_numbers: set[int]) -> Iterator[Finding]:
    yield from _path(row.category, row.technique, ATTACK_TECHNIQUES)
    yield from _known("reference", row.reference, numbers)
    yield from _code(row.code)
    batch = row.batch
    if batch.size is None:
        yield "batch.size", "is missing.", "write batch = { size = 8 }, the largest batch."
    if row.algorithm == "fedsgd" and (batch.epochs or batch.local_steps):
        yield (
            "batch",
            "counts local work although the algorithm is fedsgd.",
            f"write batch = {{ size = {batch.size} }}, or correct the algorithm.",
        )
    if row.algorithm == "fedavg" and not (batch.epochs or batch.local_steps):
        yield (
            "batch",
            "lacks the local work of fedavg.",
            f"write batch = {{ epochs = 5, size = {batch.size or 8} }} (E x B).",
        )
    labels = row.label_recovery
    if labels.kind == "row":
        if labels.row is None:
            yield "label_recovery.row", "is missing.", 'name it: { kind = "row", row = 2 }.'
        elif labels.row not in attack_numbers:
            yield "label_recovery.row", f"there is no attack {labels.row}.", "name a row's number."
        elif labels.row == row.number:
            yield "label_recovery.row", "is this row itself.", 'write { kind = "new" }.'
    elif labels.row is not None:
        yield (
            "label_recovery.row",
            f"means nothing with kind = {labels.kind!r}.",
            'write kind = "row", or leave it out.',
        )
    if (labels.kind == "outside") != (labels.url is not None):
        yield (
            "label_recovery.url",
            "belongs to kind = 'outside', and only there.",
            'write { kind = "outside", url = "https://..." }.',
        )


def _defense(row: Defense, numbers: set[int]) -> Iterator[Finding]:
    yield from _path(row.category, row.technique, DEFENSE_TECHNIQUES)
    for number in row.works:
        yield from _known("works", number, numbers)
    for entry, evidence in enumerate(row.evidence, 1):
        for number in evidence.works:
            yield from _known(f"evidence[{entry}].works", number, numbers)
    yield from _code(row.code)


def _reference(row: Reference) -> Iterator[Finding]:
    if row.authors[0] == "others":
        yield "authors", "begins with 'others'.", "name the first author as 'Family, Given'."
    if row.entry == "misc" and not row.eprint:
        yield "eprint", "is missing.", 'an unpublished work needs it: eprint = "1906.08935".'


def _path(category: str, technique: str, known: dict[str, tuple[str, ...]]) -> Iterator[Finding]:
    if technique not in known[category]:
        yield (
            "technique",
            f"{technique!r} does not belong to category {category!r}.",
            closest(technique, known[category]),
        )


def _known(field: str, number: int, numbers: set[int]) -> Iterator[Finding]:
    if number not in numbers:
        yield (
            field,
            f"there is no reference {number}.",
            f"add a [[reference]] with number = {number}, or correct the number.",
        )


def _code(code: Code) -> Iterator[Finding]:
    if (code.kind in ("link", "colab")) != (code.url is not None):
        yield (
            "code.url",
            f"does not fit kind = {code.kind!r}.",
            'write code = { kind = "link", url = "https://..." }, or leave code out.',
        )


def _corrections(row: Row) -> Iterator[Finding]:
    fields = type(row).model_fields
    for entry, correction in enumerate(row.corrections, 1):
        where = f"corrections[{entry}]"
        name = correction.field
        if name not in fields or name in ("corrections", "notes"):
            yield f"{where}.field", f"{name!r} is no field of this row.", closest(name, fields)
            continue
        present = _plain(getattr(row, name))
        if _typed(row, name, correction.printed) != present:
            yield (
                f"{where}.printed",
                f"does not repeat the row's {name}.",
                f"write printed = {toml(present)}.",
            )
        corrected = _typed(row, name, correction.corrected)
        if corrected is None:
            yield (
                f"{where}.corrected",
                f"{correction.corrected!r} is no value for {name}.",
                f"write it as the row does, like {toml(present)}.",
            )
        elif corrected == present:
            yield f"{where}.corrected", "equals the printed value.", "remove the correction."


def _typed(row: Row, name: str, value: Any) -> Any:
    """``value`` as the field holds it, in plain form; None if it does not fit."""
    adapter: TypeAdapter[Any] = TypeAdapter(get_type_hints(type(row), include_extras=True)[name])
    try:
        return _plain(adapter.validate_python(value))
    except ValidationError:
        return None


def _plain(value: Any) -> Any:
    return TypeAdapter(Any).dump_python(value, mode="json", exclude_none=True)


def _duplicates(
    rows: tuple[R, ...],
    field: str,
    of: Callable[[R], object],
    origins: dict[int, tuple[str, str]],
) -> Iterator[Problem]:
    files = list(dict.fromkeys(file for file, _ in origins.values()))
    first: dict[object, R] = {}
    # in the order the files were given: the row that came later is the one to change
    for row in sorted(rows, key=lambda row: files.index(origins[id(row)][0])):
        value = of(row)
        if value in first:
            file, label = origins[id(first[value])]
            here, own = origins[id(row)]
            yield Problem(
                file=here,
                row=own,
                field=field,
                message=f"{value!r} is taken by {label} in {file}.",
                fix=f"choose another {field}.",
            )
        else:
            first[value] = row
