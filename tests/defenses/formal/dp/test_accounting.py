"""Epsilon against anchors of an independent privacy-loss-distribution accountant."""

from __future__ import annotations

import math
import sys

import pytest

from leakatlas.defenses.formal.dp._accounting import epsilon, gaussian_delta, gaussian_epsilon
from leakatlas.errors import InvalidParameter, Unavailable

LOCAL = {"sampling_rate": 64 / 5000, "steps": 780, "delta": 1e-5}
"""Batches of 64 out of 5,000 local examples, ten epochs."""


@pytest.mark.parametrize(("z", "steps"), [(1.0, 1), (2.0, 4)])
def test_without_sampling_it_is_the_analytic_gaussian(z: float, steps: int) -> None:
    assert epsilon(z, steps=steps, delta=1e-5) == pytest.approx(4.377, abs=5e-4)


# The numerical accountant reports an upper bound within 0.01 of its estimate.
@pytest.mark.parametrize(
    ("z", "setting", "anchor"),
    [
        (1.0, {"sampling_rate": 0.1, "steps": 50, "delta": 1e-3}, 3.314),
        (0.5, LOCAL, 14.74),
        (1.0, LOCAL, 2.12),
        (2.0, LOCAL, 0.714),
    ],
)
def test_subsampled_anchors(z: float, setting: dict[str, float], anchor: float) -> None:
    found = epsilon(
        z,
        steps=int(setting["steps"]),
        delta=setting["delta"],
        sampling_rate=setting["sampling_rate"],
    )
    assert anchor - 0.005 <= found <= anchor + 0.02


def test_renyi_accounting_is_looser() -> None:
    loose = epsilon(1.0, steps=50, delta=1e-3, sampling_rate=0.1, accountant="rdp")
    assert loose == pytest.approx(4.021, abs=0.02)  # anchors differ in the orders they search
    assert loose > epsilon(1.0, steps=50, delta=1e-3, sampling_rate=0.1)


def test_privacy_curve_is_inverted_and_monotone() -> None:
    for mu in (0.01, 0.3, 1.0, 5.0, 40.0):
        for delta in (1e-9, 1e-5, 1e-2):
            eps = gaussian_epsilon(delta, mu)
            assert gaussian_delta(eps, mu) <= delta * (1 + 1e-6)
            assert eps == 0.0 or gaussian_delta(eps * 0.999, mu) > delta
    assert epsilon(2.0, steps=1, delta=1e-5) < epsilon(1.0, steps=1, delta=1e-5)


def test_degenerate_values() -> None:
    assert epsilon(0.0, steps=3, delta=1e-5) == math.inf
    assert epsilon(1.0, steps=0, delta=1e-5) == 0.0
    for wrong in ({"delta": 0.0}, {"delta": 1.0}, {"sampling_rate": 0.0}, {"steps": -1}):
        arguments = {"steps": 1, "delta": 1e-5, "sampling_rate": 1.0, **wrong}
        with pytest.raises(InvalidParameter, match="epsilon"):
            epsilon(
                1.0,
                steps=int(arguments["steps"]),
                delta=arguments["delta"],
                sampling_rate=arguments["sampling_rate"],
            )


def test_without_opacus_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    assert epsilon(1.0, steps=1, delta=1e-5) > 0  # the closed form needs no package
    with pytest.raises(Unavailable, match=r"pip install 'leakatlas\[opacus\]'"):
        epsilon(1.0, steps=1, delta=1e-5, sampling_rate=0.1)
