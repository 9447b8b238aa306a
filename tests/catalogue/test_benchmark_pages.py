from __future__ import annotations

from typing import Any

from leakatlas.catalogue.benchmark_pages import render
from leakatlas.catalogue.results import Result


def _result(recipe: dict[str, Any]) -> Result:
    return Result.model_validate(
        {
            "schema": "leakatlas/result/1", "kind": "benchmark", "key": "engine",
            "code_version": 1, "recipe": recipe, "hardware": "2 CPU cores", "seeds": [0],
            "command": "python benchmarks/descent.py", "date": "2026-11-24",
            "measures": [
                {"name": "small: traced / bare loop", "value": 0.25, "unit": "",
                 "interval": [0.2, 0.3], "n": 9, "note": "a | b"},
                {"name": "small: bare loop", "value": 4.0, "unit": "ms", "interval": None, "n": 1,
                 "note": ""},
            ],
        }
    )  # fmt: skip


def test_measures_stand_under_their_case() -> None:
    page = render([_result({"threads": 1})])
    assert page is not None
    assert "### small" in page
    assert "| traced / bare loop | 0.25 | 0.2 to 0.3 | 9 | a / b |" in page
    assert "| bare loop | 4 ms |  | 1 |  |" in page


def test_curves_are_read_at_shares_of_the_published_time() -> None:
    curves = {
        "small": {
            "published": {"seconds": [5.0, 100.0], "psnr": [10.0, 20.0]},
            "tuned": {"seconds": [10.0, 20.0], "psnr": [15.0, 30.0]},
        }
    }
    page = render([_result({"curves": curves})])
    assert page is not None
    assert "| small | published | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 20.0 |" in page
    assert "| small | tuned | - | 15.0 | 15.0 | 30.0 | 30.0 | 30.0 | 30.0 |" in page


def test_without_benchmarks_there_is_no_page() -> None:
    assert render([]) is None
