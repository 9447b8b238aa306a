"""The meter of memory: against tensors of known size."""

from __future__ import annotations

import pytest
import torch

from leakatlas.bench.meter import allocated, least


def test_what_is_given_back_is_not_held_at_once() -> None:
    w = torch.rand(512, 1_024)

    def three_of_which_two_at_once() -> None:
        doubled = w * 2
        doubled = doubled + 1
        doubled.mul(3)

    found = allocated(three_of_which_two_at_once)
    # The two numbers take some bytes of their own.
    assert found.total == pytest.approx(3 * w.nbytes, rel=1e-4)
    assert found.most == pytest.approx(2 * w.nbytes, rel=1e-4)
    assert allocated(w.t).total == 0


def test_the_least_of_several_calls_counts() -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    assert least(lambda: None, times=3, clock=lambda: next(ticks)) == 2.0
