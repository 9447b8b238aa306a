"""Measured values: what ``results/*.json`` may hold, and whether it is still true.

A result is written by a run, never by hand. It names the version of the code that produced it; once
the class's ``version`` has moved on, the result is *stale* and shown as such.
"""

from __future__ import annotations

import json
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
    if kind not in ("attack", "defense"):
        return None
    found = source.of("attack" if kind == "attack" else "defense", key)
    return None if found is None else found.version


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
            Differential.model_validate(data)
            return None, []
        result = Result.model_validate(data)
    except ValidationError as failure:
        schema = Differential if differential else Result
        return None, from_validation(failure, schema, file=path.name, row=row)
    return result, _check(result, path.name)


def _check(result: Result, file: str) -> list[Problem]:
    problems = []

    def report(field: str, message: str, fix: str) -> None:
        problems.append(Problem(file=file, row=result.key, field=field, message=message, fix=fix))

    if result.kind in ("attack", "defense"):
        rows = loader.attacks() if result.kind == "attack" else loader.defenses()
        keys = [row.key for row in rows]
        if result.key not in keys:
            report("key", f"there is no {result.kind} {result.key!r}.", closest(result.key, keys))
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
    root = repository_root()
    if root is None:
        return None
    parts = registry.module_path(kind, key).split(".")[1:-1]
    folder = root.joinpath("tests", *parts)
    # A row that is a package has its tests in a folder of the same name.
    for path in (folder / f"test_{key}.py", folder / key / f"test_{key}.py"):
        if path.is_file():
            return path
    return None
