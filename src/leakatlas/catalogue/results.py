"""Measured values: what ``results/*.json`` may hold, and whether it is still true.

A result is written by a run, never by hand. It names the version of the code that produced it; once
the class's ``version`` has moved on, the result is *stale* and shown as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from leakatlas.catalogue import loader, registry, source
from leakatlas.catalogue.problems import Problem, closest, from_validation
from leakatlas.catalogue.schema import Count, Letter, Stance, Strict, Text

SCHEMA = "leakatlas/result/1"

# Share of victims an adversary may reconstruct before a defense no longer "holds", and from which
# it "fails". 5 % is the success rate at which the utility loss of a defense is quoted; one half
# is ours.
HOLDS_BELOW = 0.05
FAILS_ABOVE = 0.5


class Measure(Strict):
    """One measured number."""

    name: Annotated[Text, Field(description="What was measured.", examples=["psnr"])]
    value: Annotated[
        float,
        Field(strict=True, allow_inf_nan=False, description="The mean.", examples=[21.3]),
    ]
    unit: Annotated[str, Field(description="Unit, empty for a ratio.", examples=["dB"])] = ""
    interval: Annotated[
        tuple[float, float] | None,
        Field(description="Confidence interval [low, high], or null.", examples=[[20.1, 22.5]]),
    ]
    n: Annotated[Count, Field(description="How many victims or trials.", examples=[32])]
    note: Annotated[str, Field(description="What a reader must know.")] = ""
    letter: Annotated[
        Letter | None, Field(description="Threat model of the adversary.", examples=["B"])
    ] = None
    vantage: Annotated[
        Literal["wire", "server", "aggregate", "peer"] | None,
        Field(description="Where the adversary looks.", examples=["wire"]),
    ] = None


class Result(Strict):
    """One ``results/*.json`` file."""

    schema_: Annotated[
        Literal["leakatlas/result/1"],
        Field(alias="schema", description="Version of the format.", examples=[SCHEMA]),
    ]
    kind: Annotated[
        Literal["attack", "defense", "measure", "benchmark"],
        Field(description="What the result is about.", examples=["attack"]),
    ]
    key: Annotated[Text, Field(description="The row, or the name of the study.", examples=["dlg"])]
    code_version: Annotated[
        int, Field(ge=1, strict=True, description="`version` of the class.", examples=[1])
    ]
    recipe: Annotated[
        dict[str, Any], Field(min_length=1, description="The recipe of the run, as it wrote it.")
    ]
    hardware: Annotated[Text, Field(description="Machine.", examples=["2 CPU cores"])]
    seeds: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(min_length=1, description="Seeds of the runs.", examples=[[0, 1, 2]]),
    ]
    measures: Annotated[
        tuple[Measure, ...], Field(min_length=1, description="The measured values.")
    ]
    command: Annotated[
        Text, Field(description="What reproduces it.", examples=["leakatlas bench study.yaml"])
    ]
    date: Annotated[
        str,
        Field(
            pattern=r"^\d{4}-\d{2}-\d{2}$", description="Day of the run.", examples=["2026-01-31"]
        ),
    ]

    @property
    def stale(self) -> bool:
        """Whether the class has moved on since (never for measures and benchmarks)."""
        now = current_version(self.kind, self.key)
        return now is not None and now != self.code_version


class Differential(Strict):
    """One ``results/differential/*.json`` file: ours beside the official code, on equal inputs."""

    schema_: Annotated[Literal["leakatlas/result/1"], Field(alias="schema")]
    kind: Literal["differential"]
    key: Annotated[Text, Field(description="The row.")]
    code_version: Annotated[int, Field(ge=1, strict=True)]
    repository: Annotated[Text, Field(description="Address of the official code.")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", description="Its commit.")]
    files: Annotated[tuple[Text, ...], Field(min_length=1, description="What was compared.")]
    inputs: Annotated[Text, Field(description="What both were given.")]
    tolerance: Annotated[dict[str, Any], Field(min_length=1, description="What counts as equal.")]
    note: str = ""
    hardware: Text
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


def current_version(kind: str, key: str) -> int | None:
    """The ``version`` of the class behind a row, or None where there is none."""
    if kind not in ("attack", "defense") or key not in _keys(kind):
        return None
    found = source.of("attack" if kind == "attack" else "defense", key)
    return None if found is None else found.version


def _keys(kind: str) -> list[str]:
    return [row.key for row in (loader.attacks() if kind == "attack" else loader.defenses())]


def read(path: Path) -> tuple[Result | None, list[Problem]]:
    """One result file and everything that is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return None, [
            Problem(
                file=path.name,
                message=f"is no valid JSON: {error}.",
                fix="let the run write the file again.",
            )
        ]
    differential = isinstance(data, dict) and data.get("kind") == "differential"
    row = str(data.get("key", "")) if isinstance(data, dict) else ""
    try:
        if differential:
            found = Differential.model_validate(data)
            return None, list(_check_common(found, path.name))
        result = Result.model_validate(data)
    except ValidationError as failure:
        schema = Differential if differential else Result
        return None, from_validation(failure, schema, file=path.name, row=row)
    return result, [*_check_common(result, path.name), *_check(result, path.name)]


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
    found = (read(path)[0] for path in files(folder))
    return tuple(result for result in found if result is not None)


def of_row(results: tuple[Result, ...], kind: str, key: str) -> tuple[Result, ...]:
    """The results about one row."""
    return tuple(result for result in results if (result.kind, result.key) == (kind, key))


def measured_stances(results: tuple[Result, ...], key: str) -> dict[str, Stance]:
    """The measured colour of each letter of a defense.

    Read from fresh measures named ``success_rate`` (the share of victims that the strongest
    attack of that letter reconstructs). Several vantages or runs of one letter: the worst counts.
    """
    worst: dict[str, float] = {}
    for result in of_row(results, "defense", key):
        for measure in result.measures:
            if result.stale or measure.name != "success_rate" or measure.letter is None:
                continue
            worst[measure.letter] = max(worst.get(measure.letter, 0.0), measure.value)
    return {letter: stance_of(rate) for letter, rate in sorted(worst.items())}


def stance_of(rate: float) -> Stance:
    """The colour of a success rate."""
    if rate <= HOLDS_BELOW:
        return "holds"
    return "fails" if rate >= FAILS_ABOVE else "partial"


def repository_root() -> Path | None:
    """The checkout that this package lies in, or None for an installed copy."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else None


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
