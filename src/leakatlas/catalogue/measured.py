"""What ``results/*.json`` may hold: figures of a study, older ones, and differentials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from leakatlas.catalogue import code, loader, source
from leakatlas.catalogue.schema import Count, Letter, Strict, Text
from leakatlas.errors import UnknownName

SCHEMA = "leakatlas/result/1"


class Measure(Strict):
    """One measured number."""

    name: Annotated[Text, Field(description="What was measured.", examples=["psnr"])]
    case: Annotated[str, Field(description="The case of the study.", examples=["tanh"])] = ""
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

    @property
    def title(self) -> str:
        """The case and the name."""
        return f"{self.case}: {self.name}" if self.case else self.name


class Result(Strict):
    """One ``results/*.json`` file."""

    # A study's figures become results here, by the field's own name.
    model_config = ConfigDict(populate_by_name=True)

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
    study: Annotated[str, Field(description="The study file behind it.", examples=["dlg"])] = ""
    carried_over: Annotated[
        bool,
        Field(
            description="Measured before there were study files, by a script that is gone; `study` "
            "measures it again."
        ),
    ] = False
    changed: Annotated[
        bool, Field(description="Whether the code behind a study's figures has changed since.")
    ] = False

    @property
    def outdated(self) -> bool:
        """Whether the class says that its results may differ from these (a raised ``version``).

        Never for measures and benchmarks. This is what generated documents show: it moves when an
        author says so, not with every line of code.
        """
        now = current_version(self.kind, self.key)
        return now is not None and now != self.code_version

    @property
    def stale(self) -> bool:
        """Whether it should be measured again: outdated, changed code, or code unknown by hash."""
        return self.outdated or self.changed or self.carried_over

    @property
    def state(self) -> Literal["carried over", "outdated", "current"]:
        """In a word, for documents that do not move with every line of code."""
        if self.carried_over:
            return "carried over"
        return "outdated" if self.outdated else "current"

    @property
    def again(self) -> str:
        """The command that measures it again; ``command`` is the one that measured it."""
        return f"leakatlas bench {self.study}" if self.carried_over and self.study else self.command


class OfficialFigure(Strict):
    """One figure that the official code gave on inputs made from seeds."""

    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    tolerance: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="Largest relative difference of ours.")
    ]


class Differential(Strict):
    """One ``results/differential/*.json`` file: ours beside the official code, on equal inputs."""

    schema_: Annotated[Literal["leakatlas/result/1"], Field(alias="schema")]
    kind: Literal["differential"]
    key: Annotated[Text, Field(description="The row.")]
    code_version: Annotated[int, Field(ge=1, strict=True)]
    repository: Annotated[Text, Field(description="Address of the official code.")]
    commit: Annotated[
        str,
        Field(
            pattern=r"^([0-9a-f]{40}|\d+(\.\d+)+)$",
            description="Its commit, or the version of the package that was run.",
        ),
    ]
    files: Annotated[tuple[Text, ...], Field(min_length=1, description="What was compared.")]
    inputs: Annotated[Text, Field(description="What both were given.")]
    tolerance: Annotated[dict[str, Any], Field(min_length=1, description="What counts as equal.")]
    note: str = ""
    official: Annotated[
        dict[Text, OfficialFigure],
        Field(
            description="Figures that `leakatlas bench --differential` compares again; without "
            "any, the measures are a record of one comparison."
        ),
    ] = Field(default_factory=dict)
    hardware: Text
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class StudyFigure(Strict):
    """One figure of one case of a study."""

    name: Text
    value: Annotated[float, Field(strict=True, allow_inf_nan=False)]
    unit: str
    interval: tuple[float, float]
    interval_by: Annotated[
        Literal["bootstrap", "wilson"],
        Field(description="Resampled images, or Wilson's interval of a share."),
    ]
    n: Annotated[Count, Field(description="How many values.")]
    images: Annotated[Count, Field(description="How many images (or batches) they belong to.")]
    note: str = ""


class CurvePoint(Strict):
    """What a case has reached by some time."""

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False, description="CPU time.")]
    psnr: Annotated[float, Field(allow_inf_nan=False, description="Mean of the best iterates.")]
    interval: tuple[float, float]


class StudyCase(Strict):
    """One case of a study: what was run, how it ended, what was measured."""

    case: Text
    beside: dict[str, str] | None
    letter: Letter
    vantage: Literal["wire", "server", "aggregate", "peer"]
    setup: Annotated[dict[str, Any], Field(description="The whole case, as the study has it.")]
    note: str
    cells: Annotated[Count, Field(description="How many there are.")]
    missing: Annotated[int, Field(ge=0, description="Cells that were not run yet.")]
    status: Annotated[dict[str, int], Field(description="How the others ended, and how many.")]
    reasons: Annotated[tuple[str, ...], Field(description="Why some crashed or were refused.")]
    code: Annotated[tuple[str, ...], Field(description="Hashes of the code behind them.")]
    version: Annotated[
        int | None, Field(description="`version` of the class of the row, where there is one.")
    ]
    measures: tuple[StudyFigure, ...]
    nulls: Annotated[tuple[StudyFigure, ...], Field(description="Null baselines.")]
    curve: Annotated[
        tuple[CurvePoint, ...], Field(description="PSNR against time, where iterates were kept.")
    ] = ()


class StudyComparison(StudyFigure):
    """A paired difference between two cases."""

    of: Text
    minus: Text


class StudyResult(Strict):
    """One ``results/<study>.json``: the figures of a study, derived from its records."""

    schema_: Annotated[Literal["leakatlas/result/2"], Field(alias="schema")]
    kind: Literal["study"]
    key: Annotated[Text, Field(description="Name of the study.")]
    title: Text
    question: Text
    chosen: Annotated[Text, Field(description="What was chosen on which images.")]
    command: Text
    provenance: Literal["measured"]
    versions: tuple[Text, ...]
    machines: tuple[dict[str, Any], ...]
    hardware: Text
    dates: Annotated[tuple[str, ...], Field(description="First and last day.", min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    cases: Annotated[tuple[StudyCase, ...], Field(min_length=1)]
    compare: tuple[StudyComparison, ...]
    summary: Annotated[
        tuple[StudyFigure, ...], Field(description="Figures over all cases, by the study itself.")
    ] = ()

    def by_row(self) -> tuple[Result, ...]:
        """The figures by the row that they stand beside; one benchmark for those beside none."""
        groups: dict[tuple[Literal["attack", "defense", "benchmark"], str], list[StudyCase]] = {}
        for case in self.cases:
            beside = case.beside or {}
            if "attack" in beside:
                groups.setdefault(("attack", beside["attack"]), []).append(case)
            elif "defense" in beside:
                groups.setdefault(("defense", beside["defense"]), []).append(case)
            else:
                groups.setdefault(("benchmark", self.key), []).append(case)
        if self.summary:
            groups.setdefault(("benchmark", self.key), [])
        found = (self._of(kind, key, cases) for (kind, key), cases in groups.items())
        return tuple(result for result in found if result is not None)

    def _of(
        self, kind: Literal["attack", "defense", "benchmark"], key: str, cases: list[StudyCase]
    ) -> Result | None:
        measures = []
        for case in cases:
            label = "" if case.case == "main" else case.case
            told = _told(case)
            for figure in (*case.measures, *case.nulls):
                name = figure.name
                if figure in case.nulls:
                    name = f"null baseline {name}"
                measures.append(
                    Measure(
                        name=name,
                        case=label,
                        value=figure.value,
                        unit=figure.unit,
                        interval=figure.interval,
                        n=figure.n,
                        note="; ".join(filter(None, (figure.note, case.note, told))),
                        letter=case.letter,
                        vantage=case.vantage,
                    )
                )
        if kind == "benchmark":
            measures += [
                Measure(
                    name=figure.name, value=figure.value, unit=figure.unit,
                    interval=figure.interval, n=figure.n, note=figure.note,
                )
                for figure in self.summary
            ]  # fmt: skip
        named = {case.case for case in cases}
        measures += [
            Measure(
                name=f"{pair.name}, paired",
                case=f"{pair.of} minus {pair.minus}",
                value=pair.value,
                unit=pair.unit,
                interval=pair.interval,
                n=pair.n,
                note=pair.note,
            )
            for pair in self.compare
            if pair.of in named
        ]
        if not measures:  # every cell of this row died before it could be scored
            return None
        return Result.model_validate(
            {
                "schema": "leakatlas/result/1",
                "kind": kind,
                "key": key,
                "code_version": min((c.version for c in cases if c.version is not None), default=1),
                "recipe": {"study": self.key, "chosen": self.chosen, "curves": _curves(cases)},
                "hardware": self.hardware,
                "seeds": self.seeds,
                "measures": measures,
                "command": self.command,
                "date": self.dates[-1],
                "study": self.key,
                "changed": any(self._changed(case) for case in cases),
            }
        )

    def _changed(self, case: StudyCase) -> bool:
        root = repository_root()
        try:
            own = None if root is None else code.own_file(root / "studies" / self.key, case.setup)
            now = code.of_case(case.setup, own)
        except UnknownName:  # its attack or defense is gone
            return True
        return case.code != (now,)


def _curves(cases: list[StudyCase]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """PSNR against time: a chart for all values of the last axis together."""
    charts: dict[str, dict[str, dict[str, list[float]]]] = {}
    for case in cases:
        if case.curve:
            chart, _, series = case.case.rpartition("/")
            charts.setdefault(chart, {})[series] = {
                "seconds": [point.seconds for point in case.curve],
                "psnr": [point.psnr for point in case.curve],
            }
    return charts


def _told(case: StudyCase) -> str:
    """How the cells of a case ended, where it was not all well."""
    odd = {name: count for name, count in case.status.items() if name != "complete"}
    if case.missing:
        odd["not run"] = case.missing
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in odd.items())
    return f"of {case.cells} cells {counts}" if counts else ""


def current_version(kind: str, key: str) -> int | None:
    """The ``version`` of the class behind a row, or None where there is none."""
    if kind not in ("attack", "defense"):
        return None
    rows = loader.attacks() if kind == "attack" else loader.defenses()
    if key not in [row.key for row in rows]:
        return None
    found = source.of("attack" if kind == "attack" else "defense", key)
    return None if found is None else found.version


def repository_root() -> Path | None:
    """The checkout that this package lies in, or None for an installed copy."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else None
