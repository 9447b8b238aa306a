from __future__ import annotations

from leakatlas.catalogue.label_pages import render
from leakatlas.catalogue.results import Measure, Result


def _study(**values: float) -> Result:
    return Result.model_validate(
        {
            "schema": "leakatlas/result/1",
            "kind": "measure",
            "key": "labels",
            "code_version": 1,
            "recipe": {"trials": 1},
            "hardware": "2 CPU cores",
            "seeds": [0],
            "command": "python benchmarks/labels.py",
            "date": "2026-11-22",
            "measures": [
                Measure(
                    name=f"irec/{rule}/digits/relu/trained/B=8",
                    value=value,
                    interval=None,
                    n=1,
                    note="whole batch right in 0 of 1; 3 labels padded in all",
                ).model_dump()
                for rule, value in values.items()
            ],
        }
    )


def test_rules_are_ranked_and_only_those_above_the_floor_stand_out() -> None:
    page = render([_study(**{"even-spread": 0.5, "llg": 0.52, "zlg": 0.9})])
    assert page is not None
    rows = [line for line in page.splitlines() if line.startswith("| ") and "rule" not in line]
    assert rows == [
        "| zlg | **0.90** | 0 of 1 |",
        "| llg | 0.52 | 0 of 1 |",
        "| even-spread | 0.50 | 0 of 1 |",
    ]


def test_without_the_study_there_is_no_page() -> None:
    assert render([]) is None
