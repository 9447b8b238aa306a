"""What an audit prints for people at a terminal of usual width."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from leakatlas.cli.progress import realism_lines, verdict_table
from leakatlas.report import Realism, Report
from leakatlas.report.realism import COINCIDE
from tests.report.test_realism import STRONG, WEAK
from tests.report.test_write import report  # noqa: F401  # a fixture


def printed(found: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(verdict_table(found))
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_both_verdicts_fit_into_eighty_columns(report: Report) -> None:  # noqa: F811
    text = printed(report)
    assert "…" not in text and "as deployed" in text and "diagnostic upper bound" in text
    for found in report.standings():
        for run in (found.deployed_run, found.bound_run):
            assert run is None or run.attack in text
    assert any(found.deployed_run is not None for found in report.standings())


def test_the_two_sides_rest_on_runs_of_their_own(report: Report) -> None:  # noqa: F811
    apart = Realism("s", report.realism[0].record, separates=("labels",), runs=(STRONG,))
    text = printed(replace(report, runs=(WEAK,), realism=(apart,), letters=("B",)))
    assert "not demonstrated" in text and "recognisable" in text


def test_the_record_says_what_separates_or_that_nothing_does(report: Report) -> None:  # noqa: F811
    record = report.realism[0].record
    apart = Realism("s", record, ("small",), separates=("labels",), reason="no time")
    text = "\n".join(realism_lines(apart))
    assert "FedSGD" in text and "1 images" not in text and "granted: nothing" in text
    assert "small" in text and "beyond as deployed: labels" in text and "not run: no time" in text
    assert COINCIDE in "\n".join(realism_lines(Realism("s", record)))
