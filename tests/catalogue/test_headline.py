"""Which figure stands for a row."""

from typing import Any

import pytest

from leakatlas.catalogue import headline, results
from leakatlas.catalogue.results import Result


def measure(name: str, value: float, **more: Any) -> dict[str, Any]:
    base = {"name": name, "value": value, "unit": "dB", "interval": [value, value], "n": 8}
    return {**base, **more}


def result(*measures: dict[str, Any], kind: str = "attack", key: str = "dlg") -> Result:
    return Result.model_validate(
        {
            "schema": "leakatlas/result/1", "kind": kind, "key": key,
            "code_version": results.current_version(kind, key) or 1, "recipe": {"a": 1},
            "hardware": "2 CPU cores", "seeds": [0], "measures": measures,
            "command": "leakatlas bench study", "date": "2026-01-31",
        }
    )  # fmt: skip


def stale(found: Result) -> Result:
    return found.model_copy(update={"code_version": found.code_version + 1})


def test_the_best_mean_psnr_stands_for_an_attack() -> None:
    found = headline.of_attack(
        [
            result(
                measure("psnr, a", 20.0), measure("psnr, b", 25.0), measure("ssim", 99.0, unit="")
            )
        ],
        "dlg",
    )
    assert found is not None and found.what == "psnr, b" and not found.stale


def test_a_figure_of_a_study_names_its_case() -> None:
    found = headline.of_attack([result(measure("psnr", 20.0, case="batch 8"))], "dlg")
    assert found is not None and found.what == "psnr, batch 8"


@pytest.mark.parametrize(
    "name", ["psnr_grey_image", "null baseline psnr", "psnr_full_minus_no_bn", "psnr, paired"]
)
def test_what_is_held_against_it_does_not(name: str) -> None:
    found = headline.of_attack([result(measure(name, 50.0), measure("psnr", 20.0))], "dlg")
    assert found is not None and found.what == "psnr"


def test_a_single_trial_stands_back_behind_an_interval() -> None:
    one = measure("psnr, one", 50.0, interval=None, n=1)
    found = headline.of_attack([result(one, measure("psnr, many", 20.0))], "dlg")
    assert found is not None and found.what == "psnr, many"


def test_fresh_figures_come_first_and_stale_ones_say_so() -> None:
    old, new = stale(result(measure("psnr, old", 50.0))), result(measure("psnr, new", 20.0))
    found = headline.of_attack([old, new], "dlg")
    assert found is not None and found.what == "psnr, new"
    found = headline.of_attack([old], "dlg")
    assert found is not None and found.stale


def test_without_decibels_the_first_share_stands() -> None:
    figures = (measure("queries", 9.0, unit="rounds"), measure("exact", 0.5, unit="share"))
    found = headline.of_attack([result(*figures)], "dlg")
    assert found is not None and found.what == "exact"
    assert headline.of_attack([result(*figures)], "idlg") is None


def strengths(*knobs: str) -> Result:
    figures = []
    for number, knob in enumerate(knobs):
        figures += [
            measure(f"test accuracy [rate={knob}]", 0.9 - number / 10, unit="share"),
            measure(f"PSNR, adaptive attack [rate={knob}]", 20.0 - number),
            measure(f"PSNR, worst attack per victim [rate={knob}]", 30.0 - number),
            measure(f"seconds per round [rate={knob}]", 1.0, unit="s"),
        ]
    return result(*figures, kind="defense", key="gradient_pruning")


def test_a_curve_has_its_strengths_in_order() -> None:
    knob, points, is_stale = headline.curve([strengths("0", "0.8", "0.95")], "gradient_pruning")
    assert knob == "rate" and not is_stale
    assert [point.knob for point in points] == ["0", "0.8", "0.95"]
    assert set(points[0].psnr) == {"knows the defense", "worst for each victim"}


def test_a_study_replaces_the_strengths_that_were_carried_over() -> None:
    def figure(name: str, who: str, value: float) -> dict[str, Any]:
        return {**measure(name, value), "case": f"gradient_pruning, rate=0.8/{who}"}

    old = strengths("0", "0.8").model_copy(update={"carried_over": True})
    new = result(
        figure("accuracy", "utility", 0.5),
        figure("psnr_worst", "adaptive, at the published strength", 12.0),
        figure("psnr", "adaptive, at the published strength", 11.0),
        kind="defense", key="gradient_pruning",
    )  # fmt: skip
    for both in ([old, new], [new, old]):
        _, points, _ = headline.curve(both, "gradient_pruning")
        at = {point.knob: point for point in points}
        assert at["0.8"].accuracy.value == 0.5
        assert at["0.8"].psnr["worst for each victim"].value == 12.0


@pytest.mark.parametrize(("knobs", "knob"), [(("0", "0.5", "0.8"), "0.8"), (("0", "0.5"), "0.5")])
def test_a_defense_stands_at_its_default_or_at_the_first_strength(
    knobs: tuple[str, ...], knob: str
) -> None:
    found = headline.of_defense([strengths(*knobs)], "gradient_pruning")
    assert found is not None and f"rate = {knob}," in found.what
    assert headline.of_defense([strengths("0")], "gradient_pruning") is None


@pytest.mark.parametrize(
    ("text", "number"), [("0.4", 0.4), ("2 / 3", 2 / 3), ("inf", float("inf")), ("'x'", None)]
)
def test_numbers_are_read_as_modules_write_them(text: str, number: float | None) -> None:
    assert headline._number(text) == number
