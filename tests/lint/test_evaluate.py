"""Rates over judged models: one for a model, one for a run, and only where a check could run."""

from __future__ import annotations

import pytest

from leakatlas.lint import evaluate, holdings, thresholds
from leakatlas.lint.evaluate import Judged

BAR = thresholds.shipped().thresholds
STATISTIC = next(s for s in sorted(holdings.WEIGHTS) if 0 < BAR[s] < 1)
OVER, UNDER = (BAR[STATISTIC] + 1) / 2, BAR[STATISTIC] / 2
CHECK = STATISTIC.split("/")[0]


def test_a_run_alarms_once_however_many_of_its_checkpoints_do() -> None:
    models = [
        Judged("run", "fc", {STATISTIC: OVER}),
        Judged("run", "fc", {STATISTIC: OVER}),
        Judged("other", "fc", {STATISTIC: UNDER}),
    ]
    found = evaluate.rates(models, everywhere=True)
    assert found["weights"] == [1.0, 1.0, 0.0]
    assert found["weights, independent"] == [1.0, 0.0]
    assert found[CHECK] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_check_that_cannot_run_is_silent_or_left_out(everywhere: bool) -> None:
    models = [Judged("a", "fc", {STATISTIC: OVER}), Judged("b", "fc", {})]
    found = evaluate.rates(models, everywhere=everywhere)
    assert found[CHECK] == ([1.0, 0.0] if everywhere else [1.0])
    assert found["weights"] == [1.0, 0.0]


def test_lower_levels_alarm_more() -> None:
    almost = Judged("a", "fc", {STATISTIC: BAR[STATISTIC] - 1e-6})
    found = evaluate.rates([almost], everywhere=True)
    assert found["weights"] == [0.0] and found["weights, level 0.0"] == [1.0]
    assert found["weights, level 0.9"] == [0.0]


def test_calibration_keeps_the_two_largest_groups() -> None:
    models = [Judged(g, "fc", {STATISTIC: v}) for g, v in (("a", 0.1), ("a", 0.4), ("b", 0.3))]
    found = evaluate.calibrated(models)
    assert found["models"] == 3
    assert (found[f"largest/{STATISTIC}"], found[f"second/{STATISTIC}"]) == (0.4, 0.3)
