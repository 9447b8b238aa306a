"""Reports and gates in MLflow (extra ``tracking``): beside the training runs that they are about.

>>> with mlflow.start_run():                                     # doctest: +SKIP
...     report = leakatlas.audit(model, batch, protocol=protocol)
...     log_report(report, gates=["P(psnr > 20 dB) > 0.05"])

A run gets one verdict for each letter (tags), what the strongest attacks reached (metrics), what
was asked (parameters), the report itself (artifacts), and each gate with its answer: passed,
failed, or undecided, which is no pass. Where it is logged to is MLflow's own matter
(``MLFLOW_TRACKING_URI``, a local file store say); nothing is sent anywhere else.

Source: the tracking API of mlflow 3.17 (``mlflow.log_params``, ``set_tags``, ``log_metrics``).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Literal

import mlflow

from leakatlas.errors import Undecided
from leakatlas.report import Report

PREFIX = "leakatlas"

CEILING = 1000.0
"""Decibels that stand for an image that is equal to the last bit: stores take finite numbers."""

Answer = Literal["passed", "failed", "undecided"]


def log_report(report: Report, *, gates: Sequence[str] = ()) -> dict[str, Answer]:
    """Log a report to MLflow's active run, or to one of its own if none is active.

    Args:
        report: What an audit found.
        gates: Conditions under which the audit fails, as ``leakatlas audit --fail-on``.

    Returns:
        The answer to every gate.

    Raises:
        InvalidParameter: If a gate cannot be read; nothing is logged then.
    """
    answers = {gate: answer(report, gate) for gate in gates}
    if mlflow.active_run() is None:
        with mlflow.start_run(run_name="leakatlas audit"):
            _log(report, answers)
    else:
        _log(report, answers)
    return answers


def answer(report: Report, gate: str) -> Answer:
    """What a gate says of a report; silence of an audit that was not whole is no pass.

    Raises:
        InvalidParameter: If it cannot be read.
    """
    try:
        return "failed" if report.exceeds(gate) else "passed"
    except Undecided:
        return "undecided"


def _log(report: Report, answers: dict[str, Answer]) -> None:
    undecided = "; ".join(report.undecided())
    mlflow.set_tags(
        {
            **{f"{PREFIX}.verdict.{found.letter}": found.verdict for found in report.verdicts()},
            **{f"{PREFIX}.gate.{i}": f"{text}: {said}"[:5000]
               for i, (text, said) in enumerate(answers.items())},
            f"{PREFIX}.undecided": undecided[:5000] or "no",
        }
    )  # fmt: skip
    mlflow.log_params(
        {
            f"{PREFIX}.letters": "".join(report.letters),
            f"{PREFIX}.attacks": ", ".join(dict.fromkeys(run.attack for run in report.runs))[:5000],
            f"{PREFIX}.command": report.command[:5000],
        }
    )
    mlflow.log_metrics({f"{PREFIX}/{name}": value for name, value in _figures(report).items()})
    with tempfile.TemporaryDirectory() as folder:
        report.save(folder)
        mlflow.log_artifacts(folder, artifact_path=PREFIX)


def _figures(report: Report) -> dict[str, float]:
    """The worst that came out of every image, over images; and what was tried."""
    figures = {"attacks tried": float(sum(run.tried for run in report.runs))}
    for name, values in report.worst_case().items():
        if not values:
            continue
        plain = [min(value, CEILING) for value in values]
        if name == "exact":
            figures["share exact"] = statistics.fmean(plain)
        else:
            figures[f"{name} mean"] = statistics.fmean(plain)
            figures[f"{name} worst"] = (min if name == "mse" else max)(plain)
    return figures
