"""Reports: what an audit found as plain data, and how it is written for people and machines."""

from leakatlas.report.context import Context
from leakatlas.report.data import Comparison, LetterVerdict, Report
from leakatlas.report.gate import Gate, parse_gate
from leakatlas.report.realism import Realism, Side, Standing
from leakatlas.report.run import Run, pictures_of
from leakatlas.report.words import (
    RECOGNISABLE_PSNR,
    TRIED,
    VERDICTS,
    Status,
    Verdict,
    beside,
    rank,
    recognisable,
    verdict,
)
from leakatlas.report.write import check_writable, render_page, write_report

__all__ = [
    "RECOGNISABLE_PSNR",
    "TRIED",
    "VERDICTS",
    "Comparison",
    "Context",
    "Gate",
    "LetterVerdict",
    "Realism",
    "Report",
    "Run",
    "Side",
    "Standing",
    "Status",
    "Verdict",
    "beside",
    "check_writable",
    "parse_gate",
    "pictures_of",
    "rank",
    "recognisable",
    "render_page",
    "verdict",
    "write_report",
]
