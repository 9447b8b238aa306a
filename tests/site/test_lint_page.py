"""The page of lint and its thresholds follow from the results of their study, and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from leakatlas.bench import study as studies
from leakatlas.bench.schema import OwnMeasure
from leakatlas.catalogue import results
from leakatlas.catalogue.results import Result
from leakatlas.lint import holdings, thresholds
from leakatlas.site import lint_page
from leakatlas.site.lint_page import Figures, Rate

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(r for r in results.load(ROOT / "results") if r.key == lint_page.STUDY)


def figures(**replaced: Any) -> Figures:
    """Those of the checkout, each result changed alike."""
    return Figures(tuple(result.model_copy(update=replaced) for result in OURS))


def without(figures: Figures, population: str) -> Figures:
    kept = [
        r.model_copy(update={"measures": tuple(m for m in r.measures if population not in m.case)})
        for r in figures.results
    ]
    return Figures(tuple(kept))


def test_the_committed_files_are_what_the_results_say() -> None:
    for path, text in lint_page.generated(OURS).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, path


def test_thresholds_follow_the_rule_on_what_the_study_measured() -> None:
    statistics = figures().calibration()["statistics"]
    assert tuple(statistics) == holdings.CALIBRATED
    for name, row in statistics.items():
        pair = {w: figures().value("calibration", f"{w}/{name}") for w in ("largest", "second")}
        assert row["threshold"] == thresholds.calibrated(pair)


def test_the_study_measures_what_the_page_asks_for() -> None:
    study = studies.load(ROOT / "studies/lint")
    named = {
        (label, measure.name)
        for label, case in study.cases.items()
        for measure in case.measures
        if isinstance(measure, OwnMeasure)
    }
    assert set(figures().measures) <= named
    rates = {*holdings.HOLDINGS, *holdings.CHECKS, *holdings.DETECTORS}
    for label in study.cases:
        assert label == "calibration" or {(label, rate) for rate in rates} <= named
    populations = {label.partition("/")[2] for label in study.cases} - {""}
    assert populations == {*lint_page.HONEST, *lint_page.ROWS}


def test_no_rate_is_worse_than_before_weights_were_judged_by_direction() -> None:
    """Figures of 2026-11-22: 2 and 3 of 126 on the held-out half, 0 of 392 on fresh models."""
    found = figures()
    alarms = [found.rate("held out", "honest", held) for held in holdings.HOLDINGS]
    assert all(rate is not None and rate.n == 126 for rate in alarms)
    assert all(rate.hits <= most for rate, most in zip(alarms, (2, 3, 3, 3), strict=True) if rate)
    for held in holdings.HOLDINGS:
        fresh = found.rate("fresh", "honest", held)
        assert fresh is not None and (fresh.hits, fresh.n) == (0, 392)
        for part in ("held out", "fresh"):
            for row in set(lint_page.ROWS) - {"seer"}:
                rate = found.rate(part, row, held)
                assert rate is not None and rate.hits == rate.n


def test_a_fresh_part_judged_by_other_thresholds_is_left_out() -> None:
    assert "## Fresh hold-out" in figures().page(figures().calibration())
    other = figures().calibration()
    other["statistics"]["D2/rank"]["threshold"] = 0.5
    assert "## Fresh hold-out" not in figures().page(other)


def test_what_the_study_measured_stands_before_what_was_carried_over() -> None:
    def result(carried: bool, value: float) -> Result:
        first = OURS[0]
        kept = first.measures[0].model_copy(update={"value": value, "interval": None})
        return first.model_copy(update={"carried_over": carried, "measures": (kept,)})

    where = (OURS[0].measures[0].case, OURS[0].measures[0].name)
    for order in ([False, True], [True, False]):
        found = Figures(tuple(result(carried, float(carried)) for carried in order))
        assert found.measures[where][0].value == 0.0


def test_honest_models_are_counted_over_both_kinds() -> None:
    both, runs = (
        figures().rate("held out", "honest", "D8"),
        figures().rate("held out", "checkpoints", "D8"),
    )
    starts = figures().rate("held out", "initialisations", "D8")
    assert both is not None and runs is not None and starts is not None
    assert (both.hits, both.n) == (runs.hits + starts.hits, runs.n + starts.n)
    low, high = Rate(0, 10).interval
    assert low == pytest.approx(0, abs=1e-12) and 0.2 < high < 0.35


def test_a_row_that_was_not_played_has_no_column() -> None:
    found = without(figures(), "fishing")
    page = found.page(found.calibration())
    assert "fishing" not in page.split("## What this does not show")[0].split("Where one is")[0]
    assert lint_page.generated(()) == {}
