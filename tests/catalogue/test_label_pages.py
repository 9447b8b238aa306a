from __future__ import annotations

from leakatlas.catalogue.label_pages import render, render_withheld
from leakatlas.catalogue.results import Measure, Result


def _study(key: str, case: str, **values: float) -> Result:
    return Result.model_validate(
        {
            "schema": "leakatlas/result/1",
            "kind": "benchmark",
            "key": key,
            "code_version": 1,
            "recipe": {"study": key},
            "hardware": "2 CPU cores",
            "seeds": [0],
            "command": f"leakatlas bench {key}",
            "date": "2026-11-22",
            "measures": [
                Measure(name=name, case=case, value=value, interval=(0.0, 1.0), n=30).model_dump()
                for name, value in values.items()
            ],
        }
    )


def _rows(page: str | None) -> list[str]:
    assert page is not None
    return [line for line in page.splitlines() if line.startswith("| ")][1:]


def test_rules_are_ranked_and_only_those_above_the_floor_stand_out() -> None:
    values = {"even-spread": 0.5, "llg": 0.52, "zlg": 0.9, "refusals": 1.5}
    page = render([_study("labels", "digits/relu/trained/B=8", **values)])
    assert _rows(page) == [
        "| zlg | **0.90** | 0.00, 1.00 | 30 |",
        "| llg | 0.52 | 0.00, 1.00 | 30 |",
        "| even-spread | 0.50 | 0.00, 1.00 | 30 |",
    ]
    assert page is not None and "## digits, relu, trained, B=8" in page
    assert "1.5 rules refused" in page


def test_withheld_heads_have_a_page_of_their_own() -> None:
    values = {"irec_gdbr": 0.75, "irec_even_spread": 0.5, "refused": 0.25}
    page = render_withheld([_study("labels_withheld", "convnet/trained/8", **values)])
    assert _rows(page) == [
        "| convnet | trained | 8 | 0.75 [0.00, 1.00] | 0.50 [0.00, 1.00] | 25% | 30 |"
    ]


def test_without_the_study_there_is_no_page() -> None:
    assert render([]) is None and render_withheld([]) is None
