"""The schema of ``report.json``, written beside every report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from leakatlas.metrics.score import Scores
from leakatlas.report.context import Context
from leakatlas.report.realism import Side
from leakatlas.report.tally import Tally
from leakatlas.report.words import Status, Verdict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", title=None)


class RunPart(_Part):
    """One attack on one setting, or the reason why it was not run."""

    setting: str
    attack: str
    letter: str
    vantage: str
    target: int
    defenses: list[str]
    status: Status
    reason: str
    verdict: Verdict
    wants: str
    trace: str
    unkept: str
    seconds: float
    rounds: int
    reads: list[str]
    scores: Scores | None
    confidence: list[float]
    recipe: dict[str, Any]
    notes: dict[str, float]
    execution: str = ""


class ComparisonPart(_Part):
    """One set of defenses: what still leaked, and the accuracy on a task."""

    name: str
    defenses: list[dict[str, Any]]
    runs: list[RunPart]
    accuracy: float | None
    reason: str
    task: str


class VerdictPart(_Part):
    """What one threat model achieved as configured (``run`` indexes ``runs``) and on both sides."""

    letter: str
    verdict: Verdict
    run: int | None
    as_deployed: Verdict
    as_deployed_by: dict[str, str] | None
    upper_bound: Verdict
    upper_bound_by: dict[str, str] | None
    between: str
    recovered: Annotated[
        list[Tally | None],
        Field(min_length=2, max_length=2, description="As deployed, and as an upper bound."),
    ]


class RealismPart(_Part):
    """What was held fixed on one setting, and the runs of the other verdict."""

    setting: str
    record: dict[str, Any]
    cautions: list[str]
    configured: Side
    separates: list[str]
    runs: list[RunPart]
    reason: str


class ReportFile(_Part):
    """The whole file."""

    schema_: Literal["leakatlas/report/3"]
    letters: list[str]
    verdicts: list[VerdictPart]
    undecided: list[str]
    worst_case: dict[str, list[float]]
    runs: list[RunPart]
    context: Context
    realism: list[RealismPart]
    comparisons: list[ComparisonPart]
    diagnoses: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    command: str
    source: dict[str, Any]
    complete: bool
    seconds: float
    unwritten: str


def report_schema() -> dict[str, Any]:
    """JSON Schema of ``report.json``."""
    schema = ReportFile.model_json_schema()
    # `schema` is a method name of pydantic models, hence the underscore in the class only.
    schema["properties"] = {
        "schema" if name == "schema_" else name: value
        for name, value in schema["properties"].items()
    }
    schema["required"] = ["schema" if name == "schema_" else name for name in schema["required"]]
    return schema
