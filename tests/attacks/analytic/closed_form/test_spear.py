from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.analytic.closed_form.spear import (
    SPEAR,
    Factors,
    Pool,
    Precision,
    consistency,
    draw,
    expected_samples,
    factorise,
    independent,
    input_layer,
    numerical_rank,
    zeros_of,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks import readout
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box, ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, Stage, View
from leakatlas.models import ConvNet, FCNet
from tests.attacks.analytic.support import UNIT, crops, errors, same_after_saving, small_stage
from tests.attacks.case import Case

CASE = Case(
    {"samples": 50_000, "chunk": 1_000},
    {"settings": {"widths": (128,), "act": "relu"}, "examples": 3},
)

NORMAL = Box(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
PRECISE = Precision.of(torch.float64)


def _stage(b: int, m: int = 200, *, box: Box = NORMAL, **settings: object) -> Stage:
    scene = {
        name: settings.pop(name) for name in ("victims", "protocol", "dtype") if name in settings
    }
    model = {"widths": (m, m, m), **settings}
    return small_stage(letter="A", model="fc", settings=model, size=8, examples=b, box=box, **scene)  # type: ignore[arg-type]  # settings are those of small_stage


def _exact(trial: Trial) -> bool:
    return trial.found.status == "complete" and float(errors(trial).max()) < 1e-6


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "m"), [(1, 200), (2, 200), (3, 200), (8, 200), (10, 200), (12, 400)])
def test_the_whole_batch_is_exact_and_the_attack_knows(b: int, m: int) -> None:
    trial = run_trial(_stage(b, m), SPEAR(samples=300_000))
    assert trial.found.status == "complete" and trial.found.notes["lambda"] == 1
    assert len(trial.images) == b == trial.found.notes["rank"]
    assert float(errors(trial).max()) < 1e-10


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("samples", [200, 2_000, 60_000])
def test_a_certificate_means_exact(seed: int, samples: int) -> None:
    """One-sided: whatever the luck, lambda = 1 comes with the batch, and less is no success."""
    stage = _stage(7, 96, seed=seed)
    trial = run_trial(stage, SPEAR(samples=samples, chunk=200), seed=seed)
    if trial.found.notes["lambda"] == 1:
        assert _exact(trial)
    else:
        assert trial.found.status == "failed" and not _exact(trial)


def test_certificates_do_occur_and_do_fail_to_occur() -> None:
    """The test above speaks of both sides."""
    assert _exact(run_trial(_stage(7, 96), SPEAR(samples=60_000, chunk=200)))
    assert run_trial(_stage(7, 96), SPEAR(samples=200, chunk=200)).found.status == "failed"


def test_plain_pixels_too_though_their_patterns_correlate() -> None:
    """Inputs in [0, 1] need more row sets than normalised ones, and a low share of zeros."""
    plain, normal = (
        run_trial(_stage(6, 400, box=box), SPEAR(samples=400_000, chunk=500))
        for box in (UNIT, NORMAL)
    )
    assert _exact(plain) and _exact(normal)
    assert plain.found.notes["samples"] > normal.found.notes["samples"]


def test_float32_is_certified_from_999_per_mille() -> None:
    trial = run_trial(_stage(8, dtype=torch.float32), SPEAR(samples=100_000))
    assert trial.found.status == "complete" and trial.found.images.dtype == torch.float32
    assert trial.found.notes["lambda"] >= 0.999
    assert float(errors(trial).max()) < 1e-4


def test_one_example_coincides_with_the_ratio_of_rows() -> None:
    trial = run_trial(_stage(1), SPEAR())
    g = trial.view.update.tensors
    ratio = readout.combined_ratio(g["hidden.1.weight"], g["hidden.1.bias"])
    assert torch.allclose(trial.found.images.flatten(), ratio, atol=1e-12)


def test_a_permuted_batch_comes_back_in_another_order_only() -> None:
    victims = crops(8, 6)
    turned = victims.subset([3, 0, 5, 1, 4, 2])
    one, two = (run_trial(_stage(6, victims=v), SPEAR(samples=50_000)) for v in (victims, turned))
    assert _exact(one) and _exact(two)
    flat = (one.images.flatten(1), two.images.flatten(1))
    assert float(torch.cdist(*flat).min(dim=1).values.max()) < 1e-9


@pytest.mark.parametrize("protocol", [FedAVG(batch_size=8, lr=0.37), FedAVG(batch_size=8, lr=1e-4)])
def test_one_local_step_of_unknown_length_is_as_good_as_a_gradient(protocol: FedAVG) -> None:
    trial = run_trial(_stage(5, protocol=protocol), SPEAR(samples=50_000))
    assert trial.found.status == "complete" and "protocol" not in trial.found.reads
    assert float(errors(trial).max()) < 1e-5


def test_equal_inputs_come_back_once() -> None:
    victims = crops(8, 4).subset([0, 1, 1, 2])
    trial = run_trial(_stage(4, victims=victims), SPEAR(samples=50_000))
    assert _exact(trial) and len(trial.images) == 3
    assert (trial.found.notes["rank"], trial.found.notes["examples"]) == (3, 4)


@pytest.mark.parametrize("seed", [4, 12])
def test_a_repeated_input_whose_labels_nearly_cancel_is_certified(seed: int) -> None:
    """In single precision some active neuron's delta is hardly more than rounding."""
    held = crops(8, 4).subset([0, 0, 1, 2])
    victims = replace(held, labels=torch.arange(4))
    stage = _stage(4, 400, victims=victims, dtype=torch.float32, seed=seed)
    trial = run_trial(stage, SPEAR(samples=50_000), seed=seed)
    assert len(trial.images) == 3 and float(errors(trial).max()) < 1e-5
    assert trial.found.status == "complete"


# -- the failures that theory predicts -------------------------------------------------------------


@pytest.mark.parametrize("act", ["softplus", "gelu", "sigmoid"])
def test_without_a_relu_it_fails_and_says_so(act: str) -> None:
    trial = run_trial(_stage(6, act=act), SPEAR(samples=20_000))
    assert trial.found.status == "failed" and trial.found.notes["lambda"] < 1
    assert "not followed by a ReLU" in trial.found.reason
    assert not len(trial.images)
    assert SPEAR().outlook(trial.view).verdict == "hopeless"


def test_a_batch_as_large_as_the_layer_has_no_rank_to_read() -> None:
    trial = run_trial(_stage(14, 12), SPEAR(samples=1_000))
    assert trial.found.status == "failed" and "full rank 12" in trial.found.reason
    assert SPEAR().outlook(trial.view).verdict == "hopeless"


def test_dependent_inputs_lower_the_rank_and_fail_openly() -> None:
    """x_3 = (x_1 + x_2) / 2: three inputs, rank two, no Q to find."""
    a, b = crops(8, 2).images
    victims = ImageSet(torch.stack([a, b, (a + b) / 2]), torch.arange(3), ("a", "b", "c"), "mix")
    trial = run_trial(_stage(3, victims=victims), SPEAR(samples=20_000))
    assert trial.found.notes["rank"] == 2
    assert trial.found.status == "failed" and trial.found.notes["lambda"] < 1


def test_too_few_row_sets_end_as_a_failure_with_the_counts() -> None:
    trial = run_trial(_stage(12, 200), SPEAR(samples=300, chunk=100))
    assert trial.found.status == "failed" and "300 row sets showed" in trial.found.reason
    assert trial.found.notes["samples"] == 300


def test_several_local_steps_are_never_called_exact() -> None:
    stage = _stage(6, protocol=FedAVG(batch_size=2, epochs=2, lr=0.5))
    trial = run_trial(stage, SPEAR(samples=5_000))
    assert trial.found.status == "failed"
    assert SPEAR().outlook(trial.view).verdict == "unknown"


def test_a_zero_gradient_has_nothing() -> None:
    view, _ = observe(_stage(3), SPEAR())
    zeros = {n: torch.zeros_like(g) for n, g in view.update.tensors.items()}
    seen = replace(view.rounds[0], update=view.update.with_tensors(zeros))
    found = SPEAR()(view.with_rounds([seen], {}))
    assert found.status == "failed" and "is zero" in found.reason


def test_a_partial_update_is_named() -> None:
    view, _ = observe(_stage(3), SPEAR())
    kept = {n: g for n, g in view.update.tensors.items() if n != "hidden.1.bias"}
    seen = replace(view.rounds[0], update=view.update.with_tensors(kept))
    assert SPEAR()(view.with_rounds([seen], {})).reason == "the update lacks hidden.1.bias"


def test_a_budget_ends_the_sampling() -> None:
    view, _ = observe(_stage(30, 200, victims=crops(8, 30)), SPEAR())
    found = SPEAR()(view, watch=Watch(seconds=0.5))
    assert found.status == "failed" and found.notes["samples"] < SPEAR().samples / 10


# -- the layer and the outlook ---------------------------------------------------------------------


def test_only_a_linear_layer_on_the_input_itself_will_do() -> None:
    layer = input_layer(FCNet(size=8, widths=(20,)), (3, 8, 8))
    assert (layer.name, layer.shape, layer.relu) == ("hidden.1", (20, 192), True)
    with pytest.raises(UnsupportedModel, match="comes behind others"):
        input_layer(ConvNet(size=8, width=4), (3, 8, 8))
    with pytest.raises(UnsupportedModel, match=r"'hidden\.1' has no bias"):
        input_layer(FCNet(size=8, widths=(20,), bias=False), (3, 8, 8))
    assert not input_layer(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (3, 8, 8)).relu


def _outlook(stage: Stage, **parameters: int) -> tuple[str, str]:
    view: View = observe(stage, SPEAR())[0]
    outlook = SPEAR(**parameters).outlook(view)
    return outlook.verdict, outlook.reason


def test_outlook_counts_the_row_sets() -> None:
    assert _outlook(_stage(6))[0] == "applicable"
    verdict, reason = _outlook(_stage(12), samples=100)
    assert verdict == "unknown" and "6.4e+03 row sets" in reason
    assert SPEAR().outlook(_stage(6).view()).verdict == "applicable"  # before any round
    conv = small_stage(letter="A", size=8)
    assert _outlook(conv) == ("hopeless", str(_refusal(conv)))


def _refusal(stage: Stage) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as caught:
        input_layer(stage.federation.model, (3, 8, 8))
    return caught.value


def test_a_saved_view_gives_the_same(tmp_path: Path) -> None:
    view, _ = observe(_stage(5), SPEAR())
    same_after_saving(SPEAR(samples=20_000), view, tmp_path)


# -- equations -------------------------------------------------------------------------------------


def _problem(b: int = 5, m: int = 60, n: int = 40) -> tuple[Tensor, Tensor, Tensor, Factors]:
    """A layer with a known D, without any network."""
    generator = torch.Generator().manual_seed(b)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, w, beta = normal(n, b), normal(m, n), normal(m)
    d = normal(m, b) * (w @ x + beta[:, None] > 0)
    factors = factorise(d @ x.T, d.sum(1), w, beta, most=99, precision=PRECISE)
    assert factors is not None
    return x, d, d @ x.T, factors


def test_the_factors_and_the_true_q_satisfy_the_equations() -> None:
    x, d, g_w, factors = _problem()
    assert factors.b == 5
    assert torch.allclose(factors.left @ factors.right, g_w, atol=1e-10)
    q = factors.left.T @ d
    assert torch.allclose(factors.left @ q, d, atol=1e-10)  # D = L Q
    assert torch.allclose(torch.linalg.inv(q) @ factors.right, x.T, atol=1e-10)
    assert torch.allclose((factors.left @ q) @ x.T, g_w, atol=1e-10)


def test_consistency_is_one_at_the_truth_whatever_the_lengths_and_less_elsewhere() -> None:
    x, d, _, factors = _problem()
    q = factors.left.T @ d
    lengths = torch.tensor([1.0, -2.0, 0.3, 40.0, -0.01], dtype=torch.float64)
    wrong = q.clone()
    wrong[:, 0] = q[:, 0] + q[:, 1]
    singular = q.clone()
    singular[:, 0] = q[:, 1]
    scores, shares, inverse = consistency(
        factors, torch.stack([q, q * lengths, wrong, singular]), PRECISE
    )
    assert scores[:2].tolist() == [1, 1] and 0 < float(scores[2]) < 1 and float(scores[3]) == 0
    assert torch.allclose(inverse[1] @ factors.right, x.T, atol=1e-9)
    assert shares.shape == (4, 5) and float(shares[2].min()) < 1


def test_drawn_kernels_vanish_on_their_rows_and_true_ones_on_half_of_all() -> None:
    _, d, _, factors = _problem()
    q = draw(factors.alive, 5, 1_001, torch.Generator().manual_seed(0))
    assert 950 < len(q) <= 1_001  # two rows with the same single zero-free column are dependent
    assert bool((zeros_of(factors.alive, q, 1e-7).sum(dim=1) >= 4).all())
    true = factors.left.T @ d
    zeros = zeros_of(factors.left, (true / true.norm(dim=0)).T, 1e-7).sum(dim=1)
    assert torch.equal(zeros, (d == 0).sum(dim=0))


def test_row_sets_are_uniform() -> None:
    """Every row appears equally often among the zeros, within five standard deviations."""
    generator = torch.Generator().manual_seed(0)
    alive = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    q = draw(alive, 4, 6_000, generator)
    hits = zeros_of(alive, q, 1e-9).double().sum(dim=0)
    # 1,500 times 4 of the 20 rows are drawn, and each of them is a zero of 3 of the 4 kernels.
    mean, std = 1_500 * 3 * 0.2, 3 * (1_500 * 0.2 * 0.8) ** 0.5
    assert float((hits - mean).abs().max()) < 5 * std


def test_every_kernel_of_a_piece_vanishes_on_all_rows_but_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    alive = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    zeros = zeros_of(alive, draw(alive, 5, 5, generator), 1e-9)
    assert zeros.sum(dim=1).tolist() == [4] * 5 and zeros.sum(dim=0).tolist() == [4] * 5


def test_row_sets_of_deficient_rank_are_left_out() -> None:
    alive = torch.ones(10, 3, dtype=torch.float64)
    assert len(draw(alive, 3, 50, torch.Generator().manual_seed(0))) == 0
    few = torch.eye(3, dtype=torch.float64)[:1]
    assert len(draw(few, 3, 50, torch.Generator().manual_seed(0))) == 0


def test_a_pool_keeps_the_sparsest_once() -> None:
    _, d, _, factors = _problem(m=200)
    true = factors.left.T @ d
    true = (true / true.norm(dim=0)).T
    pool = Pool(factors, PRECISE, 0.2)
    noisy = true + 1e-9 * torch.randn_like(true)
    assert pool.add(torch.cat([true, -true, noisy / noisy.norm(dim=1, keepdim=True)]))
    assert len(pool.directions) == 5 and pool.zeros.diff().le(0).all()
    assert not pool.add(true)
    assert not pool.add(torch.full((1, 5), 5**-0.5, dtype=torch.float64))


def test_rank_is_the_largest_gap_within_the_stated_batch() -> None:
    s = torch.tensor([9.0, 5, 1, 1e-9, 1e-10], dtype=torch.float64)
    assert numerical_rank(s, floor=1e-13, most=5) == 3
    assert numerical_rank(s, floor=1e-13, most=2) == 2
    assert numerical_rank(torch.ones(4, dtype=torch.float64), floor=1e-13, most=9) == 4


def test_independent_takes_the_first_that_are() -> None:
    e = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([e[0], -e[0], (e[0] + e[1]) / 2**0.5, e[1], e[2]])
    assert independent(rows, 3, tolerance=1e-6) == [0, 2, 4]
    assert independent(rows[:4], 3, tolerance=1e-6) == [0, 2]


def test_expected_samples() -> None:
    """1 for b = 1; 2 (1 + 1/2) for b = 2; 8 (1 + 1/2 + 1/3 + 1/4) = 50/3 for b = 4."""
    assert [expected_samples(b) for b in (1, 2, 4)] == pytest.approx([1, 3, 50 / 3])
