"""Measured values: what ``results/*.json`` may hold, and whether it is still true.

A result is written by a run, never by hand. One of a study (``leakatlas/result/2``) names the hash
of the code behind each of its cases; an older one (``leakatlas/result/1``) the version of the class
that produced it. Once the code or the version has moved on, the result is *stale* and shown as
such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from leakatlas import reading
from leakatlas.catalogue import loader, registry, source
from leakatlas.catalogue.measured import (
    Differential,
    Measure,
    Result,
    StudyFigure,
    StudyResult,
    current_version,
    repository_root,
)
from leakatlas.catalogue.problems import Problem, closest, from_validation
from leakatlas.catalogue.schema import Stance
from leakatlas.errors import InvalidInput

__all__ = [
    "FAILS_ABOVE",
    "FRONTIER",
    "HOLDS_BELOW",
    "JOIN",
    "Colour",
    "Measure",
    "Result",
    "StudyFigure",
    "current_version",
    "default_folder",
    "differential",
    "files",
    "load",
    "measured_colours",
    "measured_stances",
    "of_row",
    "read",
    "repository_root",
    "stance_of",
    "test_file",
]

# Share of victims an adversary may reconstruct before a defense no longer "holds", and from which
# it "fails". 5 % is the success rate at which the utility loss of a defense is quoted; one half
# is ours.
HOLDS_BELOW = 0.05
FAILS_ABOVE = 0.5

FRONTIER = "frontier"
"""The study of all defenses at all strengths."""

JOIN = " | "
"""Between the parts of the name of one of its figures."""


def _keys(kind: str) -> list[str]:
    return [row.key for row in (loader.attacks() if kind == "attack" else loader.defenses())]


def read(path: Path) -> tuple[tuple[Result, ...], list[Problem]]:
    """What a result file says, by row, and everything that is wrong with it."""
    try:
        data = reading.read_json(path, what="result")
    except InvalidInput as error:
        return (), [
            Problem(
                file=path.name,
                message=f"is no valid JSON: {error}",
                fix="let the run write the file again.",
            )
        ]
    kind = str(data.get("kind", "")) if isinstance(data, dict) else ""
    row = str(data.get("key", "")) if isinstance(data, dict) else ""
    schemas: dict[str, type[Result | Differential | StudyResult]] = {
        "differential": Differential,
        "study": StudyResult,
    }
    schema = schemas.get(kind, Result)
    try:
        found = schema.model_validate(data)
    except ValidationError as failure:
        return (), from_validation(failure, schema, file=path.name, row=row)
    match found:
        case Differential():
            return (), list(_check_common(found, path.name))
        case StudyResult():
            sound = found.by_row()
        case Result():
            sound = (found,)
    problems: list[Problem] = []
    for result in sound:
        problems += [*_check_common(result, path.name), *_check(result, path.name)]
    return sound, problems


def differential(path: Path) -> Differential:
    """The differential in a file.

    Raises:
        InvalidInput: If it is malformed; every problem is named.
    """
    data = reading.read_json(path, what="result")
    try:
        return Differential.model_validate(data)
    except ValidationError as failure:
        found = from_validation(failure, Differential, file=path.name, row="")
        raise InvalidInput("\n".join(map(str, found))) from None


def _check_common(result: Result | Differential, file: str) -> Iterator[Problem]:
    """What plain results and differentials have to get right alike."""
    if result.kind != "measure" and result.kind != "benchmark":
        keys = [*_keys("attack"), *_keys("defense")]
        if result.kind != "differential":
            keys = _keys(result.kind)
        if result.key not in keys:
            name = "row" if result.kind == "differential" else result.kind
            yield Problem(
                file=file,
                row=result.key,
                field="key",
                message=f"there is no {name} {result.key!r}.",
                fix=closest(result.key, keys),
            )
    try:
        date.fromisoformat(result.date)
    except ValueError:
        yield Problem(
            file=file,
            row=result.key,
            field="date",
            message=f"{result.date} is no day of the calendar.",
            fix="write the day of the run, like 2026-01-31.",
        )


def _check(result: Result, file: str) -> list[Problem]:
    problems = []

    def report(field: str, message: str, fix: str) -> None:
        problems.append(Problem(file=file, row=result.key, field=field, message=message, fix=fix))

    if not result.stale:  # an older version may have had other parameters
        for where, key, names in _named(result.recipe, "recipe", result.key):
            known = _parameters(key)
            for name in names:
                if known is not None and name not in known:
                    report(f"{where}.{name}", f"{key} has no such parameter.", closest(name, known))
    for number, measure in enumerate(result.measures, 1):
        if measure.interval is None:
            if measure.n > 1 and not measure.note:
                report(
                    f"measures[{number}].interval",
                    f"is null although n = {measure.n}.",
                    "give a confidence interval, or say in `note` why there is none.",
                )
        elif not measure.interval[0] <= measure.value <= measure.interval[1]:
            report(
                f"measures[{number}].interval",
                f"{list(measure.interval)} does not contain the value {measure.value}.",
                "write [low, high] around the value.",
            )
    return problems


def _named(value: Any, where: str, owner: str) -> Iterator[tuple[str, str, list[str]]]:
    """Parameters that a recipe names: where, of which row, and their names.

    A recipe holds rows as ``{"key": ..., "parameters": {...}}`` or with the parameters beside the
    key, and the parameters of the result's own row under ``defaults``.
    """
    if isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from _named(item, f"{where}[{number}]", owner)
    if not isinstance(value, dict):
        return
    inside = value.get("parameters", value)
    if isinstance(value.get("key"), str) and isinstance(inside, dict):
        place = where if inside is value else f"{where}.parameters"
        yield place, value["key"], [n for n in inside if n not in ("key", "version", "preset")]
        return
    if isinstance(value.get("defaults"), dict):
        yield f"{where}.defaults", owner, list(value["defaults"])
    for name, item in value.items():
        yield from _named(item, f"{where}.{name}", owner)


def _parameters(key: str) -> list[str] | None:
    """The parameters of an implemented row, or None if there is no such row."""
    for kind in ("attack", "defense"):
        if key in _keys(kind):
            found = source.of("attack" if kind == "attack" else "defense", key)
            return None if found is None else [parameter.name for parameter in found.parameters]
    return None


def files(folder: Path) -> list[Path]:
    """Every result file in a folder and below, sorted."""
    return sorted(folder.rglob("*.json"))


def load(folder: Path) -> tuple[Result, ...]:
    """Every sound result in a folder and below, by path (a missing folder holds none)."""
    return tuple(result for path in files(folder) for result in read(path)[0])


def of_row(results: tuple[Result, ...], kind: str, key: str) -> tuple[Result, ...]:
    """The results about one row."""
    return tuple(result for result in results if (result.kind, result.key) == (kind, key))


@dataclass(frozen=True)
class Colour:
    """The measured colour of one letter of a defense, and what decided it.

    Args:
        measure: Share of images that an adversary of this letter recovers.
        where: Which attack, in which setting.
        study: The study that measured it.
    """

    measure: Measure
    where: str
    study: str

    @property
    def stance(self) -> Stance:
        """What the share says."""
        return stance_of(self.measure.value)

    @property
    def words(self) -> str:
        """Share, interval, images, attack and setting."""
        low, high = self.measure.interval or (self.measure.value, self.measure.value)
        return (
            f"{self.measure.value:.0%} [{low:.0%}, {high:.0%}] of {self.measure.n} images: "
            f"{self.where}"
        )


def measured_colours(results: Iterable[Result], key: str) -> dict[str, Colour]:
    """The measured colour of each letter of a defense.

    Read from the frontier's figures named ``colour | letter | defense``, and from measures of the
    row that are not outdated and are named ``success_rate`` (the share of victims that the
    strongest attack of that letter reconstructs). Of several, the worst counts; what was carried
    over from code that is no more counts only where nothing else was measured.
    """
    worst: dict[str, Colour] = {}
    for result in sorted(results, key=lambda result: result.carried_over):
        for letter, measure in _rates(result, key):
            old = worst.get(letter)
            if old is None or (not result.carried_over and measure.value > old.measure.value):
                study = result.study or result.key
                own = measure.note if result.kind == "benchmark" else measure.case
                where = own or measure.note or f"the strongest attack of study {study}"
                worst[letter] = Colour(measure, where, study)
    return dict(sorted(worst.items()))


def _rates(result: Result, key: str) -> Iterator[tuple[str, Measure]]:
    """The shares that give colours to a defense, by letter."""
    if (result.kind, result.key) == ("defense", key) and not result.outdated:
        for measure in result.measures:
            if measure.name == "success_rate" and measure.letter is not None:
                yield measure.letter, measure
    if (result.kind, result.key) == ("benchmark", FRONTIER):
        for measure in result.measures:
            what, _, rest = measure.name.partition(JOIN)
            letter, _, about = rest.partition(JOIN)
            if (what, about) == ("colour", key):
                yield letter, measure


def measured_stances(results: Iterable[Result], key: str) -> dict[str, Stance]:
    """The measured colour of each letter of a defense, in a word."""
    return {letter: colour.stance for letter, colour in measured_colours(results, key).items()}


def stance_of(rate: float) -> Stance:
    """The colour of a success rate."""
    if rate <= HOLDS_BELOW:
        return "holds"
    return "fails" if rate >= FAILS_ABOVE else "partial"


def default_folder() -> Path:
    """``results/`` of the checkout, else of the working directory."""
    return (repository_root() or Path.cwd()) / "results"


def test_file(kind: registry.Kind, key: str) -> Path | None:
    """The test of a row's module, if the checkout has one."""
    module = registry.module_file(kind, key)
    if module is None or repository_root() is None:
        return None
    test = test_beside(module)
    return test if test.is_file() else None


def test_beside(module: Path) -> Path:
    """Where the test of a module of this checkout belongs: ``tests`` mirrors the package."""
    package = registry.PACKAGE
    tests = package.parents[1] / "tests"
    if module.name == "__init__.py":  # a row that is a package has a folder of tests
        folder = module.parent
        return tests / folder.relative_to(package) / f"test_{folder.name}.py"
    return tests / module.relative_to(package).parent / f"test_{module.name}"
