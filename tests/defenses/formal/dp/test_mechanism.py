"""Clipping and noise: bounds that hold for any input, sums that equal a plain loop."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leakatlas.defenses.formal.dp._mechanism import (
    Clipping,
    clip,
    clipped_sum,
    gaussian,
    joint_bound,
)

MANNERS: tuple[Clipping, ...] = get_args(Clipping)
values = st.floats(-1e6, 1e6, allow_subnormal=False)
vectors = st.lists(values, min_size=3, max_size=3).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
updates = st.fixed_dictionaries({"a": vectors, "b": vectors.map(lambda v: v.reshape(3, 1))})


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


@pytest.mark.parametrize("manner", MANNERS)
@given(update=updates, bound=st.floats(1e-3, 1e3))
def test_norm_is_bounded_and_small_updates_are_kept(
    manner: Clipping, update: dict[str, Tensor], bound: float
) -> None:
    clipped = clip(update, bound, manner)
    assert norm(clipped) <= joint_bound(bound, manner, 2) * (1 + 1e-12)
    if norm(update) <= bound:
        assert all(torch.equal(clipped[n], update[n]) for n in update)
    if manner == "per_layer":
        assert all(float(t.norm()) <= bound * (1 + 1e-12) for t in clipped.values())


def test_flat_clipping_keeps_the_direction_and_per_layer_does_not() -> None:
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[0.0], [40.0]])}
    flat, layered = clip(update, 1.0, "flat"), clip(update, 1.0, "per_layer")
    assert torch.allclose(flat["b"] / flat["a"].norm(), update["b"] / update["a"].norm())
    assert torch.allclose(layered["a"].norm(), layered["b"].norm())


def test_zero_tensors_are_kept_and_their_slope_is_finite() -> None:
    zeros = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(2, 2)}
    clipped = clip(zeros, 1.0, "flat")
    assert all(not t.any() for t in clipped.values())
    clipped["a"].sum().backward()
    assert zeros["a"].grad is not None and torch.isfinite(zeros["a"].grad).all()


@pytest.mark.parametrize("manner", MANNERS)
def test_clipped_sum_equals_a_loop(manner: Clipping) -> None:
    generator = torch.Generator().manual_seed(0)
    each = {
        "w": torch.randn(6, 4, 3, generator=generator, dtype=torch.float64) * 3,
        "b": torch.randn(6, 4, generator=generator, dtype=torch.float64),
    }
    each["w"][2] = 0.0
    each["b"][2] = 0.0
    loop = {n: torch.zeros_like(t[0]) for n, t in each.items()}
    for i in range(6):
        one = {n: t[i] for n, t in each.items()}
        whole = math.sqrt(sum(float(t.square().sum()) for t in one.values()))
        for n, t in one.items():
            size = whole if manner == "flat" else float(t.norm())
            loop[n] += t * min(1.0, 2.0 / size) if size else t
    got = clipped_sum(each, 2.0, manner)
    assert max(float((got[n] - loop[n]).abs().max()) for n in loop) < 1e-12


@pytest.mark.parametrize("manner", MANNERS)
@given(batch=st.lists(updates, min_size=3, max_size=3), other=updates)
def test_swapping_one_example_moves_the_sum_by_at_most_twice_the_joint_bound(
    manner: Clipping, batch: list[dict[str, Tensor]], other: dict[str, Tensor]
) -> None:
    def total(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        stacked = {n: torch.stack([e[n] for e in examples]) for n in ("a", "b")}
        return clipped_sum(stacked, 1.0, manner)

    here, there, without = total(batch), total([*batch[:2], other]), total(batch[:2])
    joint = joint_bound(1.0, manner, 2)
    assert norm({n: here[n] - there[n] for n in here}) <= 2 * joint + 1e-9
    assert norm({n: here[n] - without[n] for n in here}) <= joint + 1e-9


def test_noise_has_the_asked_deviation_shape_and_dtype() -> None:
    like = {"a": torch.zeros(200, 100), "b": torch.zeros(3, dtype=torch.float64)}
    noise = gaussian(like, 2.5, torch.Generator().manual_seed(1))
    assert noise["a"].shape == (200, 100) and noise["b"].dtype == torch.float64
    # 20,000 draws: the deviation's own standard error is 0.5 %.
    assert abs(float(noise["a"].std()) / 2.5 - 1) < 0.03
    again = gaussian(like, 2.5, torch.Generator().manual_seed(1))
    assert all(torch.equal(noise[n], again[n]) for n in like)
