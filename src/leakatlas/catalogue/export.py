"""Everything in the catalogue as one JSON document with a stable shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leakatlas.catalogue import citations, loader, registry, results, tables
from leakatlas.catalogue.schema import LETTERS, Attack, Defense, Reference, Row, ThreatModel


def export(results_folder: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """The whole catalogue: ``threat_models``, ``attacks``, ``defenses``, ``references``.

    Every row carries ``printed`` and ``corrected`` (cells under the published column names;
    ``printed`` is null where the systematization has no such row), its typed values with
    corrections applied, the corrections, and what LeakAtlas adds: ``implemented``, ``tested``,
    ``measured``.

    Args:
        results_folder: Where measured values lie; the checkout's ``results/`` if None.
    """
    measured = results.load(results_folder or results.default_folder())
    return {
        "threat_models": [threat_model(row) for row in loader.threat_models()],
        "attacks": [attack(row, measured) for row in loader.attacks()],
        "defenses": [defense(row, measured) for row in loader.defenses()],
        "references": [reference(row) for row in loader.references()],
    }


def _typed(row: Row) -> dict[str, Any]:
    values = row.corrected().model_dump(mode="json", exclude_none=True, exclude={"corrections"})
    values["corrections"] = [c.model_dump(mode="json") for c in row.corrections]
    return values


def threat_model(row: ThreatModel) -> dict[str, Any]:
    """One threat model as JSON."""
    return {**_typed(row), **_cells(row)}


def attack(row: Attack, measured: tuple[results.Result, ...]) -> dict[str, Any]:
    """One attack as JSON."""
    work = loader.reference(row.reference)
    return {
        **_typed(row),
        "number": loader.printed_number(row),
        **_work(work),
        "implemented": registry.implemented(row.key),
        "tested": results.test_file("attack", row.key) is not None,
        "measured": _measured(measured, "attack", row.key),
        **_cells(row),
    }


def defense(row: Defense, measured: tuple[results.Result, ...]) -> dict[str, Any]:
    """One defense as JSON."""
    works = [loader.reference(key) for key in row.corrected().works]
    return {
        **_typed(row),
        "number": works[0].number if works else None,
        "colours": {
            letter: tables.COLOURS[row.stance.of(letter)] for letter in LETTERS if row.stance
        },
        "measured_stance": results.measured_stances(measured, row.key),
        "bibtex": "\n".join(map(citations.bibtex, works)),
        "implemented": registry.implemented(row.key),
        "tested": results.test_file("defense", row.key) is not None,
        "measured": _measured(measured, "defense", row.key),
        **_cells(row),
    }


def reference(row: Reference) -> dict[str, Any]:
    """One work as JSON; ``printed`` and ``corrected`` are the whole printed line."""
    return {
        **_typed(row),
        "bibtex": citations.bibtex(row),
        "printed": tables.reference_text(row) if tables.is_printed(row) else None,
        "corrected": tables.reference_text(row.corrected()),
    }


def _cells(row: Row) -> dict[str, Any]:
    return {
        "printed": tables.cells_of(row) if tables.is_printed(row) else None,
        "corrected": tables.cells_of(row.corrected()),
    }


def _work(work: Reference) -> dict[str, Any]:
    corrected = work.corrected()
    return {
        "authors": list(corrected.authors),
        "year": corrected.year,
        "title": corrected.title,
        "venue": corrected.venue,
        "paper": corrected.links[-1].url,
        "bibtex": citations.bibtex(work),
    }


def _measured(
    measured: tuple[results.Result, ...], kind: registry.Kind, key: str
) -> list[dict[str, Any]]:
    return [
        {**result.model_dump(mode="json", by_alias=True), "stale": result.stale}
        for result in results.of_row(measured, kind, key)
    ]
