"""Presets whose figures changed raise `version`: a result of other parameters is never current."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leakatlas.catalogue import measured, registry

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {"defaults": "published", "published": "published", "tuned": "tuned"}
"""Under which name a recipe records the parameters of a preset."""


def recorded() -> Iterator[tuple[str, str, int, str, dict[str, Any]]]:
    """File, key, version, preset and parameters of every preset that a result was measured with."""
    for path in sorted((ROOT / "results").rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("kind") != "attack":
            continue
        for name, preset in PRESETS.items():
            found = values["recipe"].get(name)
            if isinstance(found, dict):
                parameters = found.get("parameters", found)
                yield path.name, values["key"], values["code_version"], preset, parameters


@pytest.mark.parametrize(
    ("file", "key", "version", "preset", "parameters"),
    list(recorded()),
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_result_of_other_parameters_is_of_another_version(
    file: str, key: str, version: int, preset: str, parameters: dict[str, Any]
) -> None:
    cls = registry.load_attack(key)
    now = (cls.tuned() if preset == "tuned" else cls()).to_json()
    # What a recipe does not name had its default then; a study may choose how long it searches.
    then = {**cls().to_json(), **parameters}
    changed = {
        name: (then[name], now[name])
        for name in now
        if name not in cls.counts and then[name] != now[name]
    }
    if measured.current_version("attack", key) == version:
        assert not changed, f"{file}: raise {cls.__name__}.version, or measure again"


def test_what_is_carried_over_records_its_presets() -> None:
    """A study's own figures know the code that made them; they need no such record."""
    carried = list((ROOT / "results" / "carried").rglob("*.json"))
    assert list(recorded()) or not carried
