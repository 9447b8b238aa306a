from __future__ import annotations

from leakatlas.catalogue.measure_pages import render
from leakatlas.catalogue.results import Measure, Result


def test_correlations_by_scope_and_what_was_reached_by_set_up() -> None:
    def figure(name: str, value: float, case: str = "", note: str = "") -> Measure:
        return Measure(name=name, case=case, value=value, interval=(0, 9), n=60, note=note)

    study = Result(
        schema_="leakatlas/result/1", kind="measure", key="measures", code_version=1,
        recipe={"chosen": "nothing"}, hardware="2 cores", seeds=(0,), command="script",
        study="measures", carried_over=True, date="2026-11-24",
        measures=(
            figure("spearman pooled/l2/fisher", 0.25, note="spectral; higher"),
            figure("spearman pooled/l2/rank", 0.5, note="static; lower"),
            figure("psnr", 20.0, "fc/B=1, none/l2"), figure("gain", 0.5, "fc/B=1, none/l2"),
            figure("psnr", 30.0, "vit/B=1, none/l2"), figure("gain", 5.0, "vit/B=1, none/l2"),
        ),
    )  # fmt: skip
    page = render([study])
    assert page is not None
    assert page.index("| `rank` | static | 0.50 [0.00, 9.00] | 60 |") < page.index("| `fisher` |")
    assert "| vit, B=1, none | 30.0 [0.0, 9.0] | 5.0 [0.0, 9.0] | 60 |" in page
    assert "Of 2 set-ups" in page and "in 1 by l2 matching" in page
    assert "`leakatlas bench measures`" in page and "carried over" in page
    assert "Within one set-up" not in page


def test_without_the_study_there_is_no_page() -> None:
    assert render([]) is None
