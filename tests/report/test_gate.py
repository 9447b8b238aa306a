from __future__ import annotations

import pytest

from leakatlas.errors import InvalidParameter, UnknownName
from leakatlas.report.gate import parse_gate

SCORES = {
    "psnr": [10.0, 20.0, 30.0, 40.0],
    "ssim": [0.1, 0.2, 0.9, 1.0],
    "mse": [0.1, 0.01, 0.001, 0.0],
    "exact": [0.0, 0.0, 0.0, 1.0],
}


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("P(psnr > 20 dB) > 0.05", 0.5, True),
        ("P(psnr > 20) > 0.5", 0.5, False),
        ("P(psnr >= 20) >= 0.75", 0.75, True),
        ("p( ssim<0.5 )<=0.5", 0.5, True),
        ("mean(psnr) > 25", 25.0, False),
        ("median(ssim) > 0.5", 0.55, True),
        ("max(psnr) > 39.9dB", 40.0, True),
        ("min(mse) < 1e-9", 0.0, True),
        ("exact > 0", 1.0, True),
        ("exact >= 2", 1.0, False),
    ],
)
def test_a_condition_is_read_and_judged(text: str, value: float, holds: bool) -> None:
    gate = parse_gate(text)
    assert gate.value(SCORES) == pytest.approx(value)
    assert gate.holds(SCORES) is holds


@pytest.mark.parametrize("text", ["", "psnr > 20", "P(psnr > 20 dB)", "exact", "P(psnr > x) > 0.1"])
def test_what_cannot_be_read_says_how_to_write_it(text: str) -> None:
    with pytest.raises(InvalidParameter, match=r"write 'P\(psnr > 20 dB\) > 0\.05'"):
        parse_gate(text)


def test_unknown_metrics_and_statistics_get_a_suggestion() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'psnr'"):
        parse_gate("P(psnrr > 20) > 0.1")
    with pytest.raises(UnknownName, match="Did you mean 'median'"):
        parse_gate("medain(psnr) > 20")


def test_no_images_meet_no_condition() -> None:
    nothing: dict[str, list[float]] = {metric: [] for metric in SCORES}
    assert not parse_gate("P(psnr > 20) > 0").holds(nothing)
    assert not parse_gate("max(psnr) > 0").holds(nothing)
