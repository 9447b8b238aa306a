"""The first page: shares beside a guess, what was not assessed, and words that are never used."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from leakatlas.report import Realism, render_page
from leakatlas.report.context import Context
from leakatlas.report.tally import tally
from tests.report.test_realism import a_run
from tests.report.test_write import EVIL, report  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = re.compile(r"\b(safe|compliant|anonymous|anonymi[sz]ed|GDPR-proof)\b", re.IGNORECASE)


def test_a_share_is_pooled_over_images_each_with_its_best_attack() -> None:
    weak, strong = a_run("s", "B", 0.5), a_run("s", "C", 0.05, attack="rgap")
    found = tally([("s", weak), ("s", strong)], "C")
    assert found is not None
    assert (found.images, found.recovered, found.exact) == (2, 2, 0)
    assert found.low < found.recovered / found.images <= found.high
    assert found.worst >= found.average > found.average_guess
    below = tally([("s", weak), ("s", strong)], "B")
    assert below is not None and below.recovered == 0
    assert "recovered 0 of 2 images recognisably (0 %" in below.in_words()


def test_what_a_guess_recovers_is_counted_by_the_same_bar() -> None:
    run = a_run("s", "B", 0.05)
    assert run.scores is not None
    near = replace(run.scores.images[0], null_psnr=25.0)
    scores = replace(run.scores, images=(near, *run.scores.images[1:]))
    found = tally([("s", replace(run, scores=scores))], "B")
    assert found is not None and found.guessed == 1 and found.average_guess > 10


def test_runs_of_other_settings_are_other_images() -> None:
    run = a_run("s", "B", 0.05)
    found = tally([("one", run), ("two", run)], "B")
    assert found is not None and found.images == 4
    assert tally([("one", run)], "A") is None


def test_the_context_is_printed_escaped(report) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    context = Context(
        purpose=EVIL,
        adversaries={"G": EVIL},
        special_categories=True,
        expires="2999-05-31",  # type: ignore[arg-type]  # as YAML gives it
    )
    page = render_page(replace(report, context=context))
    assert EVIL not in page and "&lt;script&gt;" in page
    assert "the day 2999-05-31<" in page and "has passed" not in page
    past = replace(report, context=Context(expires="2001-01-31"))  # type: ignore[arg-type]
    assert "the day 2001-01-31 has passed" in render_page(past)
    assert "2999-05-31" in page and "Special categories" in page and "Assessor" not in page


def test_the_first_page_says_what_an_assessment_asks(report) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    page = html.unescape(render_page(report))
    first = page[page.index('id="summary"') : page.index('id="who"')]
    for words in (
        "data reconstruction (NIST AI 100-2 E2025)", "With this configuration, adversary G",
        "95 % interval", "a guess without the update recovers", "Recognisably",
        "Not demonstrated does not mean",
        "Membership inference", "Attribute inference", "Property inference", "Collusion",
        "ML Privacy Meter", "Residual risk", "For the assessor to fill in",
        "Repeat the audit when", "Worst / average image",
    ):  # fmt: skip
        assert words in first, words
    assert "@media print" in page and "@page" in page


@pytest.mark.parametrize("side", [(), ("labels are granted",)])
def test_no_report_calls_anything_by_the_words_that_promise(report, side) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    found = Realism(EVIL, report.realism[0].record, separates=side, reason="it was left out")
    page = render_page(replace(report, realism=(found,)))
    text = html.unescape(re.sub(r"<(style|pre).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL))
    assert FORBIDDEN.findall(text) == []


def test_no_source_of_a_report_holds_those_words() -> None:
    """Verdicts, sentences and templates; what denies the words ("never safe") is no exception."""
    sources = [
        *(ROOT / "src/leakatlas/report").rglob("*.j2"),
        ROOT / "src/leakatlas/report/realism.py",
        ROOT / "src/leakatlas/report/summary.py",
        ROOT / "src/leakatlas/report/tally.py",
        ROOT / "src/leakatlas/audit/realism.py",
        ROOT / "src/leakatlas/cli/progress.py",
    ]
    for source in sources:
        assert FORBIDDEN.findall(source.read_text(encoding="utf-8")) == [], source.name
