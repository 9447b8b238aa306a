from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch.autograd import profiler_legacy

from leakatlas.blocks import readout
from leakatlas.data import Box
from leakatlas.errors import InvalidInput
from leakatlas.fl import Update
from tests.conftest import BOX

DOUBLE = torch.float64


def _rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_the_ratio_gives_the_input_and_leaves_silent_rows_out() -> None:
    x, g = _rand(7), torch.tensor([1.0, 0.0, -0.5, 1e-14], dtype=DOUBLE)
    read = readout.ratio_readout(g[:, None] * x, g)
    assert read.rows.tolist() == [0, 2]
    assert torch.allclose(read.x, x.expand(2, -1), atol=1e-12)
    assert read.strength.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (DOUBLE, 1e-12)])
def test_rounding_is_judged_by_precision(dtype: torch.dtype, tolerance: float) -> None:
    assert readout.relative_tolerance(dtype) == tolerance
    g = torch.tensor([1.0, 2 * tolerance, tolerance / 2], dtype=dtype)
    assert readout.informative_rows(g).tolist() == [0, 1]


def test_the_combination_beats_the_mean_of_ratios_under_noise() -> None:
    x = _rand(500)
    g = torch.linspace(0.01, 1.0, 30, dtype=DOUBLE)
    noise = 0.01 * torch.randn(30, 500, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    rows = g[:, None] * x + noise
    best = readout.combined_ratio(rows, g)
    plain = (rows / g[:, None]).mean(dim=0)
    assert float((best - x).square().mean()) < 0.1 * float((plain - x).square().mean())
    expected = 0.01**2 / float(g.square().sum())
    assert float((best - x).square().mean()) == pytest.approx(expected, rel=0.3)


def test_the_combination_survives_tiny_gradients() -> None:
    x, g = _rand(5), torch.tensor([1e-200, 3e-200], dtype=DOUBLE)
    assert torch.allclose(readout.combined_ratio(g[:, None] * x, g), x)
    with pytest.raises(InvalidInput, match="every factor is zero"):
        readout.combined_ratio(torch.zeros(2, 5), torch.zeros(2))


def test_differences_of_rows_are_bins_and_the_top_row_is_raw() -> None:
    h = torch.tensor([0.15, 0.45, 0.47, 0.95], dtype=DOUBLE)
    x = torch.cat([h[:, None], _rand(4, 3)], dim=1)
    delta = torch.tensor([0.3, -0.2, 0.4, 0.7], dtype=DOUBLE)
    thresholds = torch.linspace(0, 0.9, 10, dtype=DOUBLE)
    fires = (h > thresholds[:, None]).double() * delta
    read = readout.cumulative_readout(fires @ x, fires.sum(dim=1), thresholds)
    assert read.rows.tolist() == [1, 4, 9]
    assert torch.allclose(read.x[0], x[0]) and torch.allclose(read.x[2], x[3])
    mixture = (delta[1] * x[1] + delta[2] * x[2]) / (delta[1] + delta[2])
    assert torch.allclose(read.x[1], mixture)


def test_a_bin_contains_what_was_read_from_it() -> None:
    edges = torch.tensor([0.0, 1.0, 2.0, torch.inf], dtype=DOUBLE)
    h = torch.tensor([0.5, 1.5, 9.0, 1.5, -0.1], dtype=DOUBLE)
    rows = torch.tensor([0, 1, 2, 0, 0])
    assert readout.in_own_bin(h, rows, edges).tolist() == [True, True, True, False, False]


def test_a_few_contradictions_are_no_noise_and_many_are() -> None:
    divisors = torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1], dtype=DOUBLE)
    one = torch.tensor([True, True, True, True, False])
    assert readout.noise_floor(divisors, one) == 0
    assert readout.noise_floor(divisors, ~one) == pytest.approx(0.3)
    assert readout.noise_floor(divisors[:0], one[:0]) == 0


def test_energy_selects_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.01, 0.0], [0.0, 0.001]], dtype=DOUBLE)
    assert readout.energetic_rows(rows, 1e-3).tolist() == [0, 2]
    assert readout.energetic_rows(rows * 0, 1e-3).tolist() == []


def test_rows_are_scaled_to_their_bins_value() -> None:
    w = torch.full((6,), 1 / 6, dtype=DOUBLE)
    x = _rand(3, 6)
    factors = torch.tensor([[-4.0], [0.1], [0.0]], dtype=DOUBLE)
    scaled = readout.scaled_to_measurement(factors * x, w, x @ w)
    assert torch.allclose(scaled[:2], x[:2]) and bool((scaled[2] == 0).all())


@pytest.mark.parametrize("box", [Box.unit(3), BOX])
def test_the_brightest_pixel_reaches_the_top_of_the_box(box: Box) -> None:
    x = box.normalize(_rand(4, 3, 5, 5) * 0.9)
    x[:, 0, 0, 0] = box.bounds(x)[1][0]  # a saturated pixel makes the published rule exact
    rows = (x * torch.tensor([-2.0, 0.5, 3.0, -0.1], dtype=DOUBLE)[:, None, None, None]).flatten(1)
    sign = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=DOUBLE)
    scaled = readout.scaled_to_box(rows, box, (3, 5, 5), sign).reshape(x.shape)
    assert torch.allclose(scaled, x)
    assert box.contains(scaled)


def test_plausible_images_stay_in_the_box() -> None:
    x = _rand(3, 3, 8, 8)
    x[1] *= 5
    x[2, 0, 0, 0] = 9.0  # one wild pixel of 192 is forgiven
    assert readout.plausible(x, Box.unit(3)).tolist() == [True, False, True]


def test_copies_are_kept_once_and_the_surer_one() -> None:
    x = _rand(3, 10)
    doubled = torch.cat([x, x[:1] * 1.0001])
    confidence = torch.tensor([0.2, 0.9, 0.5, 0.3], dtype=DOUBLE)
    assert readout.distinct(doubled, confidence).tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["mean", "dct", "random"])
def test_measurements_are_directions(kind: readout.Measurement) -> None:
    like = torch.zeros(1, dtype=DOUBLE)
    draws = [
        readout.measurement(kind, (3, 8, 8), like=like, generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    ]
    assert draws[0].shape == (192,) and torch.equal(*draws)
    x = _rand(5, 192)
    if kind == "mean":
        assert torch.allclose(x @ draws[0], x.mean(dim=1))
    if kind == "random":
        assert float(draws[0].norm()) == pytest.approx(1)
    if kind == "dct":
        j = torch.arange(192, dtype=DOUBLE)
        assert torch.allclose(draws[0], torch.cos(math.pi * (j + 0.5) * 32 / 192) * 4 * 32 / 192)


@pytest.mark.parametrize(
    ("quantiles", "law"),
    [("normal", stats.norm(0.4, 0.2)), ("laplace", stats.laplace(0.4, 0.2 / math.sqrt(2)))],
)
def test_inner_edges_are_quantiles(quantiles: readout.Quantiles, law: stats.rv_continuous) -> None:
    edges = readout.bin_edges(quantiles, 10, mean=0.4, std=0.2)
    assert len(edges) == 11 and bool((edges.diff() > 0).all())
    expected = torch.tensor([law.ppf(i / 10) for i in range(1, 10)], dtype=DOUBLE)
    assert torch.allclose(edges[1:-1], expected)


def test_empirical_bins_hold_equal_shares() -> None:
    values = _rand(4_000) ** 2
    edges = readout.bin_edges("empirical", 20, values=values)
    shares = torch.histogram(values, edges).hist / 4_000
    assert torch.allclose(shares, torch.full((20,), 0.05, dtype=DOUBLE), atol=2e-3)


def test_the_middle_of_an_outer_bin_is_that_of_its_part_in_the_pixel_range() -> None:
    edges = torch.tensor([-0.5, 0.2, 0.6, 1.7], dtype=DOUBLE)
    assert torch.allclose(readout.bin_middles(edges), torch.tensor([0.1, 0.4, 0.8], dtype=DOUBLE))


def test_tied_surrogates_still_give_rising_edges() -> None:
    values = torch.tensor([0.1] * 50 + [0.7] * 50)
    edges = readout.bin_edges("empirical", 16, values=values)
    assert bool((edges.diff() > 0).all())
    for bad in (None, torch.tensor([0.3]), torch.tensor([0.3, 0.3])):
        with pytest.raises(InvalidInput, match="two different measurements"):
            readout.bin_edges("empirical", 16, values=bad)


@pytest.mark.parametrize(
    ("n", "k", "printed"), [(32, 64, 19.6), (64, 128, 39.1), (64, 256, 50.0), (256, 1024, 199.5)]
)
def test_expected_singletons(n: int, k: int, printed: float) -> None:
    assert readout.expected_singletons(n, k) == pytest.approx(printed, abs=0.06)


def test_occupancy_agrees_with_a_simulation() -> None:
    bins = torch.randint(64, (2_000, 32), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(bins, 64).sum(dim=1)
    singles = (counts == 1).sum(dim=1).double()
    error = float(singles.std()) / 2_000**0.5
    assert abs(float(singles.mean()) - readout.expected_singletons(32, 64)) < 3 * error


def test_weights_become_changes_and_missing_names_are_named() -> None:
    state = {"a": torch.ones(2)}
    update = Update(
        tensors={"a": torch.tensor([3.0, 5.0])}, kind="weights", state_hash="", num_examples=1
    )
    assert readout.sent_change(update, state, "a").tolist() == [2.0, 4.0]
    with pytest.raises(InvalidInput, match="does not hold 'b'"):
        readout.sent_change(update, state, "b")


def test_shapes_are_checked() -> None:
    with pytest.raises(InvalidInput, match=r"G_W \(m, n\)"):
        readout.ratio_readout(torch.ones(3, 2), torch.ones(2))


# -- what a read-out costs -------------------------------------------------------------------------


def _allocated(call: Callable[[], object]) -> int:
    """Bytes that torch allocated while ``call`` ran, all of them added up."""
    # The newer profiler takes half a minute to find out that there is no GPU.
    with profiler_legacy.profile(profile_memory=True) as watched:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in watched.function_events)


def test_the_meter_sees_a_copy() -> None:
    w = torch.rand(512, 1_024)
    assert _allocated(w.clone) == w.nbytes
    assert _allocated(lambda: w.t()[:, 3]) == 0


@pytest.mark.parametrize("kind", ["cumulative", "ratio", "energetic", "differences"])
def test_a_read_out_copies_what_is_occupied_and_not_the_layer(kind: str) -> None:
    """24 of 1,024 rows hold something: the candidates take 2.4 % of W, a copy would take 100 %."""
    rows, n, few = 1_024, 3_072, 24
    generator = torch.Generator().manual_seed(0)
    occupied = torch.randperm(rows, generator=generator)[:few]
    g_b = torch.zeros(rows)
    g_b[occupied] = torch.rand(few, generator=generator) + 0.5
    x = torch.rand(few, n, generator=generator)
    g_w = torch.zeros(rows, n)
    g_w[occupied] = g_b[occupied, None] * x
    if kind in ("cumulative", "differences"):  # rows below a threshold fire too
        g_w, g_b = (t.flip(0).cumsum(0).flip(0) for t in (g_w, g_b))
    thresholds = torch.arange(rows, dtype=torch.float32)
    calls: dict[str, Callable[[], object]] = {
        "cumulative": lambda: readout.cumulative_readout(g_w, g_b, thresholds, tolerance=1e-4),
        "ratio": lambda: readout.ratio_readout(g_w, g_b),
        "energetic": lambda: readout.energetic_rows(g_w, 1e-3),
        "differences": lambda: readout.difference_norms(g_w),
    }
    assert _allocated(calls[kind]) < 0.2 * g_w.nbytes


@pytest.mark.parametrize("few", [1, 3, 7, 50])
def test_quotients_do_not_depend_on_how_many_rows_pass_at_once(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g_w = _rand(12, 9)[:, 1:8]  # columns of a larger layer
    rows, less = torch.tensor([4, 0, 7, 11, 2]), torch.tensor([5, 1, 8])
    divisor = torch.tensor([0.5, -2.0, 1.5, 3.0, 0.1], dtype=DOUBLE)
    monkeypatch.setattr(readout, "CACHED", few * 7)
    expected = g_w[rows]
    expected[:3] -= g_w[less]
    found = readout.quotients(g_w, rows, divisor, less)
    assert torch.allclose(found, expected / divisor[:, None], rtol=1e-14)
    following = torch.cat([g_w[1:], torch.zeros(1, 7, dtype=DOUBLE)])
    assert torch.allclose(readout.difference_norms(g_w), (g_w - following).norm(dim=1))


def test_copies_are_found_whatever_their_mean() -> None:
    """The mean only rules pairs out: it may never hide a copy, nor make one of two images."""
    x = _rand(6, 40)
    x[1] = x[0] + 1e-4 * _rand(40, seed=1)
    x[3] = x[2] - x[2].mean() + x[4].mean()  # same mean as image 4, another image
    x[5] = 0
    kept = readout.distinct(x, torch.arange(6.0).flip(0))
    assert kept.tolist() == [0, 2, 3, 4, 5]
