"""Rounding into a ring: unbiased, bounded, and never overflowing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leakatlas.defenses.formal.crypto._header import Header
from leakatlas.defenses.formal.crypto.secure_aggregation._masking import Ring
from leakatlas.defenses.formal.crypto.secure_aggregation._quantization import (
    MOST_LEVELS,
    choose_levels,
    from_ring,
    into_ring,
    mean_of_sum,
    quantise,
    step_size,
    tensor_words,
    threshold_count,
    word_tensor,
)
from leakatlas.errors import InvalidParameter
from leakatlas.fl import Update, stream

WIDE = st.lists(st.floats(-20, 20), min_size=1, max_size=30)


@given(values=WIDE, levels=st.integers(2, 2**40))
def test_error_is_below_one_step_and_range_is_kept(values: list[float], levels: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    step = step_size(8.0, levels)
    whole = quantise(x, 8.0, levels, stream("rounding", levels))
    assert np.abs(whole).max() <= levels // 2
    # An odd number of levels has no level at the ends: half a step is lost there.
    edge = step * (levels // 2)
    error = np.abs(whole * step - x.clamp(-edge, edge).numpy())
    assert error.max() <= step * (1 + 1e-6)


def test_rounding_is_unbiased_and_zero_is_exact() -> None:
    x = torch.full((200_000,), 0.3 * step_size(8.0, 100), dtype=torch.float64)
    whole = quantise(x, 8.0, 100, stream("rounding"))
    assert set(np.unique(whole)) == {0, 1}
    assert whole.mean() == pytest.approx(0.3, abs=0.005)  # five deviations
    assert not quantise(torch.zeros(1000, dtype=torch.float64), 8.0, 100, stream(0)).any()


@given(
    bits=st.sampled_from([32, 64]),
    clients=st.integers(1, 2000),
    weight=st.integers(1, 1000),
)
def test_chosen_levels_never_overflow(bits: int, clients: int, weight: int) -> None:
    levels = choose_levels(Ring(bits), clients, weight, None)
    assert 2 <= levels <= MOST_LEVELS and levels % 2 == 0
    extreme = np.array([levels // 2, -(levels // 2)], dtype=np.int64) * weight
    total = into_ring(extreme, Ring(bits)) * Ring(bits).unsigned.type(clients)
    assert (from_ring(total, Ring(bits)) == extreme * clients).all()


def test_overflow_is_refused_with_a_way_out() -> None:
    assert choose_levels(Ring(32), 10, 100, 2**22) == 2**22
    with pytest.raises(InvalidParameter, match="ring_bits=64"):
        choose_levels(Ring(32), 11, 100, 2**22)
    with pytest.raises(InvalidParameter, match="overflow"):
        choose_levels(Ring(32), 2**20, 2**11, None)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20))
def test_words_round_trip(values: list[int]) -> None:
    for bits in (32, 64):
        ring = Ring(bits)
        words = into_ring(np.array(values, dtype=np.int64), ring)
        assert (tensor_words(word_tensor(words, ring), ring) == words).all()
        assert from_ring(words, ring).tolist() == values


def test_threshold_counts() -> None:
    assert [threshold_count(2 / 3, n) for n in (1, 2, 3, 5, 6, 9, 100)] == [1, 2, 2, 4, 4, 6, 67]
    assert threshold_count(1e-3, 5) == 1 and threshold_count(1.0, 5) == 5


def test_header_keeps_names_shapes_and_public_buffers_and_no_value() -> None:
    update = Update(
        tensors={"w": torch.ones(2, 3), "b": torch.full((2,), 2.0, dtype=torch.float64)},
        kind="delta",
        state_hash="hash",
        num_examples=7,
        buffers_before={"mean": torch.ones(2), "count": torch.tensor(3)},
        buffers_after={"mean": torch.full((2,), 1.5), "count": torch.tensor(9)},
    )
    header = Header.of(update)
    assert header.template.num_examples == 0
    assert all(t.is_meta for t in header.template.tensors.values())
    flat = header.flatten(update)
    assert flat.tolist() == [1.0] * 6 + [2.0] * 2 + [0.5] * 2
    back = header.unflatten(mean_of_sum(np.arange(10), 2, 1.0), 7, 3)
    assert back.tensors["w"].shape == (2, 3) and back.tensors["w"].dtype == torch.float32
    assert back.tensors["b"].tolist() == [3.0, 3.5] and back.tensors["b"].dtype == torch.float64
    assert back.buffers_after["mean"].tolist() == [5.0, 5.5]
    assert int(back.buffers_after["count"]) == 3  # as broadcast
    assert (back.kind, back.state_hash, back.num_examples, back.clients) == ("delta", "hash", 7, 3)
