"""Rows as flat records that can be filtered on any column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from leakatlas.catalogue import loader, registry, results
from leakatlas.catalogue.schema import Attack, Defense
from leakatlas.errors import UnknownName

Record = dict[str, Any]


def attack(row: Attack, *, printed: bool = False) -> Record:
    """The columns of an attack, with corrections applied unless ``printed``."""
    shown = row if printed else row.corrected()
    work = loader.reference(row.reference).corrected()
    letter = loader.threat_model(shown.threat_model)
    return {
        "kind": "attack",
        "key": row.key,
        "number": loader.printed_number(row),
        "origin": row.origin,
        "name": row.name,
        "aliases": list(row.aliases),
        "work": f"{work.authors[0].partition(',')[0]} et al. ({work.year})",
        "title": work.title,
        "year": work.year,
        "venue": work.venue,
        "category": row.category,
        "technique": row.technique,
        "mechanism": row.mechanism,
        "modality": row.modality,
        "payload": row.payload,
        "superseded_by": row.superseded_by,
        "threat_model": shown.threat_model,
        "knowledge": list(letter.knowledge),
        "algorithm": ["fedsgd", "fedavg"] if shown.algorithm == "both" else [shown.algorithm],
        "label_recovery": shown.label_recovery.kind,
        "models": list(shown.models),
        "tasks": list(shown.tasks),
        "batch": shown.batch.size,
        "resolution": list(shown.resolution) if isinstance(shown.resolution, tuple) else None,
        "code": shown.code.url,
        "implemented": registry.implemented(row.key),
        "tested": results.test_file("attack", row.key) is not None,
        "reconstructed": bool(row.reconstructed),
        "corrected": bool(row.corrections),
        "summary": row.summary,
    }


def defense(row: Defense, *, printed: bool = False) -> Record:
    """The columns of a defense, with corrections applied unless ``printed``."""
    shown = row if printed else row.corrected()
    works = [loader.reference(key).corrected() for key in shown.works]
    stances = shown.stance.model_dump() if shown.stance is not None else {}
    return {
        "kind": "defense",
        "key": row.key,
        "number": works[0].number if works else None,
        "origin": row.origin,
        "name": row.name,
        "aliases": list(row.aliases),
        "work": ", ".join(
            f"{work.authors[0].partition(',')[0]} et al. ({work.year})" for work in works
        )
        or row.ships_in,
        "title": "; ".join(work.title for work in works),
        "year": shown.year or (works[0].year if works and row.origin != "published" else None),
        "category": row.category,
        "technique": row.technique,
        "modality": row.modality,
        "payload": row.payload,
        "superseded_by": row.superseded_by,
        "where": row.where,
        "hooks": list(row.hooks),
        "holds": [letter for letter, stance in stances.items() if stance == "holds"],
        "partial": [letter for letter, stance in stances.items() if stance == "partial"],
        "fails": [letter for letter, stance in stances.items() if stance == "fails"],
        "code": shown.code.url,
        "implemented": registry.implemented(row.key),
        "tested": results.test_file("defense", row.key) is not None,
        "reconstructed": bool(row.reconstructed),
        "corrected": bool(row.corrections),
        "summary": row.intuition,
    }


def records(*, printed: bool = False) -> list[Record]:
    """Every attack, then every defense; only what the systematization prints if ``printed``."""
    rows = [
        *(attack(row, printed=printed) for row in loader.attacks()),
        *(defense(row, printed=printed) for row in loader.defenses()),
    ]
    return [row for row in rows if not printed or row["origin"] == "published"]


def select(rows: Iterable[Record], wanted: Mapping[str, Any], search: str = "") -> list[Record]:
    """The records that agree with every wanted column and contain every searched word.

    A column of many values agrees if the wanted one is among them. Text is compared without
    case. A row that lacks a column does not agree.

    Raises:
        UnknownName: If no row has a wanted column.
    """
    rows = list(rows)
    columns = sorted({column for row in rows for column in row})
    for column in wanted:
        if column not in columns:
            raise UnknownName("column", column, columns)
    words = search.casefold().split()
    return [
        row
        for row in rows
        if all(column in row and _agrees(row[column], value) for column, value in wanted.items())
        and all(word in _text(row) for word in words)
    ]


def _agrees(value: Any, wanted: Any) -> bool:
    if isinstance(value, list):
        return any(_agrees(item, wanted) for item in value)
    if isinstance(value, bool) or isinstance(wanted, bool):
        return str(value).casefold() == str(wanted).casefold()
    return value is not None and str(value).casefold() == str(wanted).casefold()


def _text(row: Record) -> str:
    return " ".join(str(value) for value in row.values()).casefold()
