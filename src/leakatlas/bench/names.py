"""Names in a study that no registry knows, said before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from leakatlas.bench.measures import COSTS, MEASURES, known
from leakatlas.bench.schema import REHEARSED, Beside, Case, OwnMeasure
from leakatlas.catalogue import loader, registry
from leakatlas.catalogue.problems import Problem, closest
from leakatlas.errors import LeakAtlasError

if TYPE_CHECKING:
    from leakatlas.bench.study import Study


def check(study: Study, shown: str) -> list[Problem]:
    """What is wrong with the names of a study.

    Args:
        study: The study.
        shown: What its file is called in messages.
    """
    problems: list[Problem] = []
    for label, case in study.cases.items():
        for field, message, fix in (
            *_rows(case),
            *_settings(case),
            *_rehearsed(study, case),
            *_beside(case.beside),
            *_measures(study, case),
        ):
            # The same mistake in the set-up shows in every case; it is said once.
            if not any((field, message) == (p.field, p.message) for p in problems):
                problems.append(
                    Problem(file=shown, row=f"case {label}", field=field, message=message, fix=fix)
                )
    for number, pair in enumerate(study.file.compare, 1):
        for side in ("of", "minus"):
            wanted = getattr(pair, side)
            if wanted not in study.cases:
                field, message, fix = _unknown(
                    f"compare[{number}].{side}", wanted, list(study.cases)
                )
                problems.append(Problem(file=shown, field=field, message=message, fix=fix))
    return problems


Found = tuple[str, str, str]
"""Field, message, way out."""


def _unknown(field: str, name: str, names: Collection[str]) -> Found:
    return field, f"there is no {name!r}.", closest(name, names)


def _rows(case: Case) -> list[Found]:
    found = []
    if case.attack is not None and case.attack.key not in registry.attack_keys():
        found.append(_unknown("attack.key", case.attack.key, registry.attack_keys()))
    for number, defense in enumerate(case.defenses, 1):
        if defense.get("key") not in registry.defense_keys():
            field = f"defenses[{number}].key"
            found.append(_unknown(field, str(defense.get("key")), registry.defense_keys()))
    return found


def _settings(case: Case) -> list[Found]:
    """What the classes themselves refuse: parameters that they lack, or outside their range."""
    from leakatlas.bench import scene  # brings torch
    from leakatlas.fl.plain import defense_from_json

    parts: list[tuple[str, Callable[[], object]]] = [("protocol", lambda: scene.protocol(case))]
    if case.attack is not None and case.attack.key in registry.attack_keys():
        parts.append(("attack", lambda: scene.attack_of(case)))
    for number, defense in enumerate(case.defenses, 1):
        if defense.get("key") in registry.defense_keys():
            build = functools.partial(defense_from_json, defense)
            parts.append((f"defenses[{number}]", build))
    found = []
    for field, make in parts:
        try:
            make()
        except LeakAtlasError as refused:
            found.append((field, str(refused), "give only what it has, within its range."))
    return found


def _rehearsed(study: Study, case: Case) -> list[Found]:
    if case.attack is None or case.attack.preset != REHEARSED or study.code_of(case):
        return []
    fix = "add one: `from leakatlas.audit.rehearsed import rehearsed as choose`."
    return [("attack.preset", f"{REHEARSED!r} takes a choose.py with `choose(cell)`.", fix)]


def _beside(beside: Beside | None) -> list[Found]:
    if beside is None:
        return []
    kind = "attack" if beside.attack is not None else "defense"
    key = beside.attack or beside.defense or ""
    rows = {row.key: row for row in (loader.attacks() if kind == "attack" else loader.defenses())}
    if key not in rows:
        return [_unknown(f"beside.{kind}", key, rows)]
    claims = [claim.measure for claim in rows[key].reported]
    if beside.reported is not None and beside.reported not in claims:
        return [_unknown("beside.reported", beside.reported, claims or ["(the row has none)"])]
    return []


def _looks() -> Collection[str]:
    from leakatlas.bench.looks import LOOKS  # brings torch

    return LOOKS


def _told(case: Case) -> Collection[str] | None:
    """The measures that what stands in place of an attack gives."""
    if case.utility is not None:
        if case.utility.course is not None:
            from leakatlas.bench.course import MEASURES as FOLLOWED  # brings torch

            return FOLLOWED
        return ("accuracy", "lr")
    if case.labelling is not None:
        from leakatlas.bench.labelling import EVEN, REFUSALS  # brings torch
        from leakatlas.blocks.labels import METHODS

        return (EVEN, REFUSALS, *METHODS)
    return None


def _measures(study: Study, case: Case) -> list[Found]:
    found = []
    told = _told(case)
    if case.attack is None and study.hook is None and told is None:
        fix = "add one, `utility`, `labelling`, or a study.py that measures by itself."
        found.append(("attack", "is missing.", fix))
    for number, measure in enumerate(case.measures, 1):
        field = f"measures[{number}]"
        if isinstance(measure, OwnMeasure) and told is not None:
            if measure.computes not in told:
                found.append(_unknown(field, measure.computes, told))
        elif isinstance(measure, OwnMeasure):
            if study.hook is None and (case.attack is None or measure.computes not in _looks()):
                fix = f"add a study.py, or take one of: {', '.join(MEASURES)}."
                found.append((field, f"{measure.name!r} is computed by nobody.", fix))
        elif not known(measure):
            found.append(_unknown(field, measure, MEASURES))
        elif case.attack is None and measure not in COSTS:
            fix = "add an `attack`, or describe a measure of your own with `name:`."
            found.append((field, f"{measure!r} is measured on an attack.", fix))
    return found
