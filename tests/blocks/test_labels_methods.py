"""Every label rule: where theory says it is exact, where it says it fails, and what it needs."""

from __future__ import annotations

import functools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas.blocks import labels
from leakatlas.blocks.labels import (
    METHODS,
    Evidence,
    HeadPass,
    Requirement,
    equations,
    greedy,
    profiles,
)
from leakatlas.blocks.labels.estimates import Points
from leakatlas.blocks.labels.single import MARGIN_AT_MINIMUM, SMALLEST_PRODUCT
from leakatlas.blocks.watch import Watch
from leakatlas.errors import (
    InvalidInput,
    InvalidParameter,
    NotGranted,
    UnknownName,
    UnsupportedModel,
)

from .test_labels import gradients, inputs, network, trained


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    last = model[-1]
    assert isinstance(last, nn.Linear)
    return last.weight.detach(), last.bias.detach()


def drawn_labels(batch: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, classes, (batch,), generator=seeded(seed))


def overlap(found: Tensor, true: Tensor) -> float:
    return float(torch.minimum(found, true).sum() / true.sum())


def mean_overlap(key: str, *, classes: int, batch: int, activation: str = "relu") -> float:
    total = 0.0
    for seed in range(12):
        model = network(activation, classes, seed=seed)
        head = labels.find_head(model)
        y = drawn_labels(batch, classes, seed)
        public = inputs(400, seed=5_000)
        evidence = Evidence(
            gradients=gradients(model, inputs(batch, seed), y),
            head=head,
            batch_size=batch,
            weight=weights_of(model)[0],
            bias=weights_of(model)[1],
            dummy=labels.head_pass(model, head, inputs(400, seed=9_000)),
            public=labels.head_pass(model, head, public, drawn_labels(400, classes, 77)),
            generator=seeded(seed),
        )
        found = labels.as_counts(labels.recover(key, evidence))
        total += overlap(found, torch.bincount(y, minlength=classes))
    return total / 12


# --- counting rules on untrained networks -------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["bias-uniform", "bias-corrected", "zlg", "zlg-bias", "ilrg", "rlu", "fixed-point", "llg*",
     "llg+", "llg", "e2egi"],
)  # fmt: skip
def test_counting_rules_find_most_labels_of_an_untrained_network(key: str) -> None:
    # chance, at 24 samples of 50 classes drawn twice, is about 0.36
    assert mean_overlap(key, classes=50, batch=24) > 0.85


def test_exact_impact_beats_the_released_one_when_the_batch_exceeds_the_classes() -> None:
    right = mean_overlap("bias-corrected", classes=5, batch=40)
    released = mean_overlap("bias-corrected-released", classes=5, batch=40)
    assert right > 0.9 and right > released + 0.05


def test_weight_rules_break_where_features_change_sign_and_bias_rules_do_not() -> None:
    assert mean_overlap("bias-uniform", classes=20, batch=12, activation="tanh") > 0.9
    for key in ("llg", "e2egi"):
        assert mean_overlap(key, classes=20, batch=12, activation="tanh") < 0.75
    model = network("tanh", 20)
    g = gradients(model, inputs(3), torch.tensor([0, 1, 2]))
    assert int(labels.column_min_set(g, labels.find_head(model)).sum()) > 10  # false positives


def clusters(y: Tensor, seed: int) -> Tensor:
    """Inputs scattered around one centre a class."""
    return 0.6 * inputs(6, seed=1)[y] + 0.3 * inputs(len(y), seed)


def test_training_spoils_the_uniform_guess_and_public_data_helps() -> None:
    model, y = network("relu", 6), torch.arange(300) % 6
    x = clusters(y, 2)
    for _ in range(20):
        found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for parameter, g in zip(model.parameters(), found, strict=True):
                parameter.sub_(0.5 * g)
    head = labels.find_head(model)
    public = labels.head_pass(model, head, clusters(y, 3), y)
    keys = ("bias-uniform", "zlg-bias", "rlu", "fixed-point")
    scores = dict.fromkeys(keys, 0.0)
    for seed in range(20):
        # half of the batch is of one class: the mean output is far from uniform
        private = torch.cat([torch.full((10,), seed % 6), drawn_labels(10, 6, seed)])
        evidence = Evidence(
            gradients=gradients(model, clusters(private, 100 + seed), private), head=head,
            batch_size=20, public=public,
            dummy=labels.head_pass(model, head, inputs(300, seed=9_000)),
        )  # fmt: skip
        true = torch.bincount(private, minlength=6)
        for key in keys:
            scores[key] += overlap(labels.as_counts(labels.recover(key, evidence)), true) / 20
    assert min(scores["rlu"], scores["fixed-point"]) > 0.85
    assert max(scores["bias-uniform"], scores["zlg-bias"]) < 0.75


# --- greedy removal -----------------------------------------------------------------------------


def test_greedy_removal_by_hand() -> None:
    # B = 4, impact -1/4: classes 0 and 2 are negative and give one each, leaving
    # (-.35, .1, .15, .1); class 0 gives two more (-.10, then .15)
    found = labels.remove_greedily(torch.tensor([-0.6, 0.1, -0.1, 0.1]), -0.25, 4)
    assert found.tolist() == [3, 0, 1, 0]


def test_the_impact_is_taken_from_the_class_just_emitted() -> None:
    # taking it from any other class would emit class 0 until the batch is full
    found = labels.remove_greedily(torch.tensor([-0.3, -0.2, 0.5]), -0.2, 4)
    assert found.tolist() == [2, 2, 0]


def test_no_negative_entry_spreads_the_batch_instead_of_raising() -> None:
    assert labels.llg(torch.ones(4, 3), 6).tolist() == [2, 2, 1, 1]
    assert labels.e2egi(torch.zeros(4, 3), 6).tolist() == [2, 2, 1, 1]


def test_e2egi_without_a_positive_row_falls_back_to_llg() -> None:
    rows = -torch.tensor([[3.0], [1.0], [2.0]])
    assert torch.equal(labels.e2egi(rows, 5), labels.llg(rows, 5))


@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=9), batch=st.integers(1, 30)
)
@settings(deadline=None)
def test_greedy_rules_always_emit_the_batch(values: list[float], batch: int) -> None:
    g = torch.tensor(values)
    for counts in (
        labels.bias_corrected(g, batch),
        labels.bias_corrected(g, batch, as_released=True),
        labels.llg(g[:, None], batch),
        labels.e2egi(g[:, None], batch),
    ):
        assert int(counts.sum()) == batch and int(counts.min()) >= 0


def test_class_row_sums_agree_with_real_gradients() -> None:
    model = network("relu", 5, bias=False)
    head = labels.find_head(model)
    x = inputs(30)
    alone = labels.class_row_sums(labels.head_pass(model, head, x))
    for k in range(5):
        g = gradients(model, x, torch.full((30,), k))
        torch.testing.assert_close(alone[k], head.weight_grad(g).sum(dim=1), rtol=0, atol=1e-12)


def test_white_box_impact_is_near_minus_s_over_b() -> None:
    seen = labels.head_pass(network("relu", 40), labels.find_head(network("relu", 40)), inputs(500))
    s = float(labels.mean_feature_sum(seen))
    own = float(labels.class_row_sums(seen).diagonal().mean()) * (1 + 1 / 40)
    assert own == pytest.approx(-s, rel=0.01)


def test_llg_impact_by_hand() -> None:
    # (1/B)(1 + 1/K) sum of negatives = (1/2)(3/2)(-3) with K = 2 rows, one negative
    assert greedy.llg_impact(torch.tensor([-3.0, 3.0]), 2) == pytest.approx(-2.25)


# --- ZLG and Dimitrov ---------------------------------------------------------------------------


@given(
    values=st.lists(
        st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=4, max_size=4
    ),
    batch=st.integers(1, 30),
)
@settings(deadline=None, max_examples=50)
def test_2_zlg_is_dimitrov_at_one_step_on_every_rounding_path(
    values: list[float], batch: int
) -> None:
    start = HeadPass(features=torch.rand(6, 1, generator=seeded()), logits=torch.zeros(6, 4))
    end = HeadPass(features=5 + start.features, logits=torch.eye(6, 4))
    g = torch.tensor(values)[:, None]
    one = labels.zlg(g, start, batch)
    for points in get_args(Points):
        other = labels.dimitrov(g, start, end, steps=1, samples=batch, points=points)
        torch.testing.assert_close(other, one, equal_nan=True)
        counts = labels.round_counts(other, batch)
        assert torch.equal(counts, labels.round_counts(one, batch))
        assert int(counts.sum()) == batch


def test_dimitrov_interpolates_up_to_the_last_step_not_the_final_weights() -> None:
    start = HeadPass(features=torch.ones(1, 1), logits=torch.tensor([[0.0, 0.0]]))
    end = HeadPass(features=torch.ones(1, 1) * 3, logits=torch.tensor([[math.log(3), 0.0]]))
    # p: (.5, .5) -> (.75, .25), s: 1 -> 3; T = 2 takes j/T in {0, 1/2}: s = 1, 2; p = .5, .625
    g = torch.tensor([[-0.1], [0.1]])
    found = labels.dimitrov(g, start, end, steps=2, samples=10)
    expected = (10 * (0.5 + 0.1 / 1) + 10 * (0.625 + 0.1 / 2)) / 2
    assert found[0].item() == pytest.approx(expected)
    last = labels.dimitrov(g, start, end, steps=2, samples=10, points="end")
    assert last[0].item() == pytest.approx(10 * (0.625 + 0.1 / 2))
    bias = labels.dimitrov_bias(g[:, 0], start, end, steps=2, samples=10)
    assert bias[0].item() == pytest.approx(10 * (0.5625 + 0.1))


def test_dimitrov_recovers_the_set_of_a_fedavg_client() -> None:
    total = 0.0
    for seed in range(6):
        model, y = network("relu", 10, seed=seed), drawn_labels(30, 10, seed)
        x, head = inputs(30, seed), labels.find_head(model)
        before = {k: v.detach().clone() for k, v in model.named_parameters()}
        after = dict(before)
        for step in range(6):  # two epochs of batches of ten
            part = slice(10 * (step % 3), 10 * (step % 3) + 10)
            leaves = {k: v.clone().requires_grad_() for k, v in after.items()}
            loss = F.cross_entropy(functional_call(model, leaves, (x[part],)), y[part])
            found = torch.autograd.grad(loss, list(leaves.values()))
            after = {
                k: v.detach() - 0.05 * g for (k, v), g in zip(leaves.items(), found, strict=True)
            }
        dummy = inputs(300, seed=9_000)
        evidence = Evidence(
            gradients=labels.mean_from_delta(before, after, lr=0.05, steps=6), head=head,
            batch_size=30, steps=6, dummy=labels.head_pass(model, head, dummy),
            dummy_end=labels.head_pass(model, head, dummy, weights=after),
        )  # fmt: skip
        true = torch.bincount(y, minlength=10)
        for key in ("dimitrov", "dimitrov-bias"):
            total += overlap(labels.as_counts(labels.recover(key, evidence)), true) / 12
    assert total > 0.85


def test_zero_mean_features_are_refused_not_divided_by() -> None:
    model = network("tanh")
    seen = labels.head_pass(model, labels.find_head(model), inputs(500))
    with pytest.raises(UnsupportedModel, match="features change sign"):
        labels.zlg(torch.ones(10, 24), seen, 4)
    zero = HeadPass(features=torch.zeros(3, 2), logits=torch.zeros(3, 4))
    with pytest.raises(UnsupportedModel):
        labels.mean_feature_sum(zero)


def test_head_pass_sees_the_input_of_the_head_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(3, 4),
    )  # fmt: skip
    x = torch.rand(5, 1, 6, 6, generator=seeded())
    head = labels.find_head(model, x[:1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = labels.head_pass(model, head, x)
    assert seen.features.shape == (5, 3)  # pooled: not the ReLU's (5, 3, 4, 4)
    torch.testing.assert_close(model[-1](seen.features), seen.logits)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_head_passes_come_in_parts_and_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, y = network("relu", 12), torch.arange(7)
    head, x = labels.find_head(model), inputs(7)
    whole = labels.head_pass(model, head, x, y)
    monkeypatch.setattr("leakatlas.blocks.labels.moments.AT_ONCE", 2 * x[0].numel())
    parts = labels.head_pass(model, head, x, y)
    torch.testing.assert_close(parts.logits, whole.logits)
    torch.testing.assert_close(parts.features, whole.features)
    assert parts.labels is not None and torch.equal(parts.labels, y)
    watch = Watch()
    watch.stop()
    some = labels.head_pass(model, head, x, y, watch=watch)
    assert some.labels is not None and torch.equal(some.labels, y[:2])
    assert len(some.logits) == len(some.features) == 2
    assert watch.cut_short


# --- RLG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh", "silu", "leaky"])
@pytest.mark.parametrize("steps", [0, 15])
def test_rlg_finds_the_set_whatever_the_activation(activation: str, steps: int) -> None:
    for seed in range(3):
        model = trained(network(activation, 30, seed=seed), steps, 30)
        y = drawn_labels(6, 30, seed)
        found = labels.rlg(
            labels.find_head(model).weight_grad(gradients(model, inputs(6, seed), y))
        )
        assert found.present.nonzero().flatten().tolist() == sorted(set(y.tolist()))
        assert found.informative and found.rank == 6


def test_rlg_says_nothing_at_full_rank_and_admits_it() -> None:
    model = network("relu", 5)
    g = labels.find_head(model).weight_grad(gradients(model, inputs(12), torch.zeros(12).long()))
    found = labels.rlg(g)
    assert found.rank == 4 and not found.informative


def test_rlg_of_a_zero_gradient_is_empty() -> None:
    found = labels.rlg(torch.zeros(4, 3))
    assert found.rank == 0 and not found.present.any()


# --- iLRG, RLU ----------------------------------------------------------------------------------


def test_solved_counts_are_exact_for_the_true_moments() -> None:
    for steps in (0, 40):
        model = trained(network("tanh", 6), steps, 6)
        x, y = inputs(50), torch.cat([torch.arange(6), drawn_labels(44, 6)])
        head = labels.find_head(model)
        by_class = labels.confusion(labels.head_pass(model, head, x, y))
        g = head.bias_grad(gradients(model, x, y))
        raw = labels.solve_counts(g, by_class, 50)
        true = torch.bincount(y, minlength=6)
        torch.testing.assert_close(raw, true.double(), rtol=0, atol=1e-8)
        fixed = labels.fixed_point(g, by_class, 50, iterations=20_000)
        assert fixed.converged and torch.equal(labels.round_counts(fixed.counts, 50), true)


def test_ilrg_is_exact_when_samples_of_a_class_are_alike() -> None:
    # one feature a class, and every class present: embeddings then average known things only
    model = network("relu", 30)
    x = inputs(1).repeat(40, 1) + 1e-3 * inputs(40, seed=3)
    y = torch.tensor([0] * 7 + [4] * 3 + [8] * 20 + [29] * 10)
    head = labels.find_head(model)
    found = labels.recover(
        "ilrg",
        Evidence(
            gradients=gradients(model, x, y), head=head, batch_size=40,
            weight=weights_of(model)[0], bias=weights_of(model)[1],
        ),
    )  # fmt: skip
    assert torch.equal(labels.as_counts(found), torch.bincount(y, minlength=30))


def test_vanishing_bias_gradients_do_not_become_nan() -> None:
    embedded = labels.class_embeddings(
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([1.0, -1.0, 1e-12])
    )
    assert torch.isfinite(embedded).all()
    torch.testing.assert_close(embedded[2], embedded[:2].mean(dim=0))
    with pytest.raises(InvalidInput, match="carries no labels"):
        labels.class_embeddings(torch.ones(3, 2), torch.zeros(3))


def test_fixed_point_reports_when_it_does_not_settle() -> None:
    by_class = torch.tensor([[0.9999, 0.0001], [0.0001, 0.9999]])
    found = labels.fixed_point(torch.tensor([-0.00001, 0.00001]), by_class, 10, iterations=2)
    assert not found.converged and found.iterations == 2


@pytest.mark.parametrize(("iterations", "settled"), [(1, False), (200, True)])
def test_counts_say_whether_they_settled(
    iterations: int, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = network("relu", 6), drawn_labels(20, 6)
    head = labels.find_head(model)
    monkeypatch.setattr(
        equations, "fixed_point", functools.partial(equations.fixed_point, iterations=iterations)
    )
    found = labels.recover(
        "fixed-point",
        Evidence(
            gradients=gradients(model, inputs(20, seed=2), y), head=head, batch_size=20,
            public=labels.head_pass(model, head, inputs(300, seed=3), drawn_labels(300, 6, 4)),
        ),
    )  # fmt: skip
    assert isinstance(found, labels.Counts) and found.settled is settled


def test_simulated_passes_follow_sgd_and_leave_the_model_alone() -> None:
    model = network("relu", 4)
    head, x, y = labels.find_head(model), inputs(8), torch.arange(8) % 4
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    passes = labels.simulated_passes(
        model, head, x, y, steps=3, lr=0.1, batch_size=8, generator=seeded()
    )
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    for seen in passes:  # batches of all eight: the draw does not matter
        torch.testing.assert_close(seen.logits, model(x).detach())
        found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for parameter, g in zip(model.parameters(), found, strict=True):
                parameter.sub_(0.1 * g)


# --- HF-GradInv ---------------------------------------------------------------------------------


def test_hf_gradinv_is_exact_on_rows_that_follow_the_profile() -> None:
    profile = labels.Profile(ranks=torch.tensor([1, 2, 3]), values=torch.tensor([1.0, 2.0, 4.0]))
    true = torch.tensor([0, 5, 0, 2, 1])
    row = torch.tensor([0.5, 1.0, 2.0, 4.0])
    rows = torch.where(true[:, None] > 0, -true[:, None] / 8 * row, row)
    assert torch.equal(labels.hf_gradinv(rows, profile, 8, generator=seeded()), true)
    evolved = labels.hf_gradinv(rows, profile, 8, generator=seeded(), enumerable=0)
    assert torch.equal(evolved, true)


def test_evolution_finds_what_enumeration_finds() -> None:
    for seed in range(5):
        fit = torch.rand(4, generator=seeded(seed), dtype=torch.float64) + 0.2
        best = profiles.enumerate_counts(fit, 14)
        found = profiles.evolve_counts(fit, 14, generator=seeded(seed))
        assert int(found.sum()) == 14 and int(found.min()) >= 1
        scores = profiles.fitness(torch.stack([best, found]), fit)
        assert scores[1].item() == pytest.approx(scores[0].item(), rel=1e-3)


def test_evolution_handles_one_class_and_as_many_classes_as_samples() -> None:
    one = profiles.evolve_counts(torch.ones(1).double(), 5, generator=seeded())
    assert one.tolist() == [5]
    full = profiles.evolve_counts(torch.ones(4).double(), 4, generator=seeded())
    assert full.tolist() == [1, 1, 1, 1]


def test_reference_profile_keeps_the_ranks_that_vary_least() -> None:
    steady = torch.tensor([[0.0, 1.0, 5.0, 90.0], [0.0, 1.0, 6.0, 10.0]])
    profile = labels.reference_profile(HeadPass(features=steady, logits=torch.zeros(2, 3)), ranks=2)
    assert profile.ranks.tolist() == [1, 2]  # rank 0 is dead, rank 3 varies ninefold
    assert profile.values.tolist() == [1.0, 5.5]


# --- one sample ---------------------------------------------------------------------------------


def soft_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("kind", ["smoothed", "mixed", "hard", "arbitrary"])
@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_3_fc_ratio_recovers_soft_labels_of_one_sample(
    kind: str, steps: int, activation: str
) -> None:
    model = trained(network(activation, 6), steps, 6)
    y = {
        "smoothed": [0.02, 0.02, 0.9, 0.02, 0.02, 0.02],
        "mixed": [0.0, 0.3, 0.0, 0.0, 0.7, 0.0],
        "hard": [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "arbitrary": [0.1, 0.2, 0.05, 0.25, 0.15, 0.25],
    }[kind]
    soft = torch.tensor([y], dtype=torch.float64)
    evidence = Evidence(
        gradients=soft_gradients(model, inputs(1), soft), head=labels.find_head(model),
        weight=weights_of(model)[0], bias=weights_of(model)[1],
    )  # fmt: skip
    found = labels.recover("fc-ratio", evidence)
    assert isinstance(found, labels.Soft)
    torch.testing.assert_close(found.probabilities, soft, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("structure", "y"),
    [
        ("smoothed", [0.02, 0.02, 0.9, 0.02, 0.02, 0.02]),
        ("smoothed", [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
        ("mixed", [0.0, 0.3, 0.0, 0.0, 0.7, 0.0]),
        ("mixed", [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_soft_labels_without_bias_follow_from_their_structure(
    structure: str, y: list[float], seed: int
) -> None:
    model = network("tanh", 6, seed=seed, bias=False)
    soft = torch.tensor(y, dtype=torch.float64)[None]
    g = soft_gradients(model, inputs(1, seed), soft)["2.weight"]
    weight = dict(model.named_parameters())["2.weight"].detach()
    found = labels.soft_label_without_bias(g, weight, structure=structure)  # type: ignore[arg-type]  # parametrised literal
    torch.testing.assert_close(found, soft[0], rtol=0, atol=1e-6)


def test_soft_label_without_bias_refuses_what_it_cannot_tell() -> None:
    with pytest.raises(InvalidInput, match="at least 4 classes"):
        labels.soft_label_without_bias(torch.ones(3, 2), torch.ones(3, 2), structure="mixed")
    with pytest.raises(InvalidInput, match="carries nothing"):
        labels.soft_label_without_bias(torch.zeros(5, 2), torch.ones(5, 2), structure="mixed")
    with pytest.raises(InvalidParameter, match="structure="):
        labels.soft_label_without_bias(torch.ones(5, 2), torch.ones(5, 2), structure="x")  # type: ignore[arg-type]  # the wrong value is the test
    with pytest.raises(InvalidInput, match="bias gradient is 0"):
        labels.fc_features(torch.ones(3, 2), torch.zeros(3))


@given(margin=st.one_of(st.floats(-40, 0), st.floats(1e-6, 25)))
@settings(deadline=None)
def test_rgap_margin_is_among_the_roots(margin: float) -> None:
    roots = labels.rgap_margins(labels.rgap_product(margin))
    assert len(roots) == (1 if margin <= 0 else 2)
    assert min(abs(root - margin) for root in roots) < 1e-6 * max(1, abs(margin)) or (
        abs(margin - MARGIN_AT_MINIMUM) < 1e-3  # flat there: the product hardly tells
    )


def test_rgap_minimum_by_hand() -> None:
    assert pytest.approx(-0.2784645, abs=1e-7) == SMALLEST_PRODUCT
    slope = labels.rgap_product(MARGIN_AT_MINIMUM + 1e-4) - labels.rgap_product(MARGIN_AT_MINIMUM)
    assert 0 < slope < 1e-8
    assert labels.rgap_margins(SMALLEST_PRODUCT) == (MARGIN_AT_MINIMUM, MARGIN_AT_MINIMUM)
    with pytest.raises(InvalidInput, match=r"at least -0\.2785"):
        labels.rgap_margins(-0.3)


@pytest.mark.parametrize("y", [-1.0, 1.0])
def test_rgap_product_and_label_from_a_real_gradient(y: float) -> None:
    w = torch.randn(6, generator=seeded(), dtype=torch.float64).requires_grad_()
    h = torch.rand(6, generator=seeded(1), dtype=torch.float64)
    (g,) = torch.autograd.grad(F.softplus(-y * (w @ h)), w)
    margin = float(y * (w.detach() @ h))
    assert labels.rgap_product(margin) == pytest.approx(float(w.detach() @ g))
    assert labels.rgap_label(g) == y
    head = labels.Head(weight_name="w", bias_name=None, in_features=6, classes=1)
    found = labels.recover("rgap", Evidence(gradients={"w": g[None]}, head=head))
    assert labels.as_counts(found).tolist() == ([1, 0] if y < 0 else [0, 1])


# --- the protocol -------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 4])
def test_delta_of_a_constant_gradient_gives_it_back(steps: int, momentum: float) -> None:
    theta = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([theta], lr=0.1, momentum=momentum)
    g = torch.tensor([1.0, -2.0, 3.0])
    for _ in range(steps):
        theta.grad = g.clone()
        optimizer.step()
    found = labels.mean_from_delta(
        {"w": torch.zeros(3)}, {"w": theta.detach()}, lr=0.1, steps=steps, momentum=momentum
    )
    torch.testing.assert_close(found["w"], g)


def test_sum_reduction_and_weight_decay_are_undone() -> None:
    g, theta = {"w": torch.tensor([2.0, 4.0])}, {"w": torch.tensor([1.0, 1.0])}
    assert labels.mean_from_sum(g, 4)["w"].tolist() == [0.5, 1.0]
    assert labels.without_weight_decay(g, theta, 0.5)["w"].tolist() == [1.5, 3.5]
    assert labels.scaled(g, 0.5)["w"].tolist() == [1.0, 2.0]


def test_clip_scale_is_exact_if_a_class_is_absent() -> None:
    model = network("relu", 10)
    head, x, y = labels.find_head(model), inputs(8), torch.tensor([0, 1, 1, 2, 3, 4, 5, 6])
    g = head.bias_grad(gradients(model, x, y))
    p = labels.mean_probability(model(x))
    assert labels.clip_scale(0.01 * g, p) == pytest.approx(0.01)
    fixed = 0.01 * g / labels.clip_scale(0.01 * g, p)
    counts = labels.round_counts(labels.counts_from_bias(fixed, p, 8), 8)
    assert torch.equal(counts, torch.bincount(y, minlength=10))
    wrong = labels.round_counts(labels.counts_from_bias(0.01 * g, p, 8), 8)
    assert not torch.equal(wrong, counts)  # scale does matter
    assert labels.clip_scale(-torch.ones(3), torch.ones(3) / 3) == 1


def test_protocol_refuses_what_it_cannot_undo() -> None:
    with pytest.raises(InvalidInput, match="batch_size must be positive"):
        labels.mean_from_sum({}, 0)
    with pytest.raises(InvalidInput, match="lr must be positive"):
        labels.mean_from_delta({}, {}, lr=0)
    with pytest.raises(InvalidInput, match="in one of the two states"):
        labels.mean_from_delta({"a": torch.zeros(1)}, {}, lr=1)
    with pytest.raises(InvalidInput, match="momentum < 1"):
        labels.effective_steps(2, 1.0)


# --- outputs ------------------------------------------------------------------------------------


def test_every_output_becomes_counts() -> None:
    expected = [2, 0, 1]
    for found in (
        labels.Counts(values=torch.tensor([2, 0, 1])),
        labels.Multiset(labels=torch.tensor([0, 0, 2]), classes=3),
        labels.Order(labels=torch.tensor([2, 0, 0]), classes=3),
        labels.Soft(probabilities=torch.tensor([[0.5, 0.4, 0.1], [0.9, 0, 0.1], [0, 0.4, 0.6]])),
    ):
        assert labels.as_counts(found).tolist() == expected
    assert labels.as_counts(labels.LabelSet(present=torch.tensor([True, False]))).tolist() == [1, 0]


def test_a_small_set_is_completed_by_its_own_classes_and_says_so() -> None:
    present = labels.LabelSet(present=torch.tensor([False, True, False, True]))
    found = labels.as_multiset(present, 5)
    assert found.labels.tolist() == [1, 1, 1, 3, 3] and found.padded == 3
    assert labels.as_multiset(present, 2).padded == 0
    with pytest.raises(InvalidInput, match="no class at all"):
        labels.as_multiset(labels.LabelSet(present=torch.zeros(4, dtype=torch.bool)), 2)


# --- the registry -------------------------------------------------------------------------------


def test_letters_follow_from_the_requirements() -> None:
    letters = {key: method.letters for key, method in METHODS.items()}
    assert letters["bias-uniform"] == letters["rlg"] == letters["ilrg"] == ("A",)
    assert letters["dimitrov"] == ("C",)
    assert letters["llg+"] == letters["rlu"] == letters["hf-gradinv"] == ("D",)
    assert labels.minimal_letters([]) == ("A",)
    assert labels.minimal_letters([Requirement.TRAINING, Requirement.AUX_DATA]) == ("D",)


@pytest.mark.parametrize("key", sorted(METHODS))
def test_a_rule_reads_no_more_than_it_declares(key: str) -> None:
    model = network("relu", 6)
    head, needs = labels.find_head(model), METHODS[key].requires
    g = gradients(model, inputs(1), torch.tensor([2]))
    if key == "rgap":
        head = labels.Head(weight_name="2.weight", bias_name=None, in_features=24, classes=1)
        g["2.weight"] = g["2.weight"][2:3]
    if Requirement.BIAS not in needs:
        del g["2.bias"]
    bridge = None
    if Requirement.BRIDGE in needs:
        del g["2.weight"]
        bridge = labels.build_bridge(model, head, inputs(20), shared=g)
    weights, runs = Requirement.WEIGHTS in needs, Requirement.ARCHITECTURE in needs
    dummy = labels.head_pass(model, labels.find_head(model), inputs(20), torch.arange(20) % 6)
    training, public = Requirement.TRAINING in needs, Requirement.AUX_DATA in needs
    found = labels.recover(
        key,
        Evidence(
            gradients=g,
            head=head,
            batch_size=1 if Requirement.BATCH_SIZE in needs else None,
            weight=weights_of(model)[0] if weights else None,
            bias=weights_of(model)[1] if weights else None,
            dummy=dummy if runs else None,
            dummy_end=dummy if runs and training else None,
            public=dummy if public else None,
            bridge=bridge,
            steps=1 if training else None,
            generator=seeded(),
        ),
    )
    expected = {
        "counts": labels.Counts, "multiset": labels.Multiset, "set": labels.LabelSet,
        "order": labels.Order, "soft": labels.Soft,
    }[METHODS[key].output]  # fmt: skip
    assert isinstance(found, expected)
    if key != "rgap":
        assert int(labels.as_counts(found)[2]) == 1


def test_what_is_not_given_is_named() -> None:
    model = network("relu", 6)
    bare = Evidence(
        gradients=gradients(model, inputs(2), torch.tensor([0, 1])), head=labels.find_head(model)
    )
    for key, field in {"llg": "batch_size", "fc-ratio": "weight"}.items():
        with pytest.raises(NotGranted, match=rf"evidence\.{field}"):
            labels.recover(key, bare)
    with pytest.raises(UnknownName, match="Did you mean 'ilrg'"):
        labels.recover("ilgr", bare)


def test_rules_agree_on_permuted_classes() -> None:
    model = network("relu", 7)
    head = labels.find_head(model)
    g = gradients(model, inputs(5), torch.tensor([1, 1, 4, 6, 0]))
    perm = torch.tensor([4, 2, 6, 0, 5, 1, 3])
    other = g | {"2.weight": g["2.weight"][perm], "2.bias": g["2.bias"][perm]}
    dummy = labels.head_pass(model, head, inputs(50))
    renamed = HeadPass(features=dummy.features, logits=dummy.logits[:, perm])
    w, b = weights_of(model)
    for key in ("bias-uniform", "llg", "llg*", "e2egi", "bias-corrected", "zlg", "zlg-bias",
                "rlg", "ilrg"):  # fmt: skip
        first = labels.recover(
            key, Evidence(gradients=g, head=head, batch_size=5, weight=w, bias=b, dummy=dummy)
        )
        second = labels.recover(
            key,
            Evidence(
                gradients=other, head=head, batch_size=5, weight=w[perm], bias=b[perm],
                dummy=renamed,
            ),
        )  # fmt: skip
        assert torch.equal(labels.as_counts(second), labels.as_counts(first)[perm]), key
