from __future__ import annotations

import math

import pytest
import torch

from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.perturbation.gradient_pruning import (
    GradientPruning,
    counts,
    kept,
    support,
)
from leakatlas.errors import IncompatibleDefenses, InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol, Trait
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    an_update,
    ledger,
    observed,
    random_tensors,
    readout_error,
    replayed,
)

MEMBERS = {
    "top_k": GradientPruning.top_k(0.8),
    "large": GradientPruning.large(0.3),
    "dual": GradientPruning(),
}


@pytest.mark.parametrize("entries", [1, 2, 7, 100, 1_001])
@pytest.mark.parametrize("rate", [0.0, 0.29, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("share", [0.0, 0.0625, 1.0])
def test_the_count_of_sent_entries_is_exact(entries: int, rate: float, share: float) -> None:
    v = torch.randn(entries, generator=torch.Generator().manual_seed(0))
    sent = int(kept(v, rate, share).sum())
    assert sent == entries - math.floor(round(rate * entries, 6))
    assert sent >= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ties_and_all_zero_tensors_keep_the_exact_count(share: float) -> None:
    for v in (torch.ones(10), torch.zeros(10)):
        assert int(kept(v, 0.4, share).sum()) == 6


def test_top_middle_and_bottom_are_a_partition() -> None:
    v = torch.randn(1_000, generator=torch.Generator().manual_seed(1))
    middle = kept(v, 0.8, 0.25)
    withheld, top = counts(1_000, 0.8, 0.25)
    assert (withheld, top) == (800, 200)
    ranked = v.abs().sort().values
    assert torch.equal(v[middle].abs().sort().values, ranked[600:800])


def test_without_a_top_share_dual_is_top_k_and_with_it_alone_large() -> None:
    v = torch.randn(100, generator=torch.Generator().manual_seed(2))
    order = v.abs().argsort()
    top = torch.zeros(100, dtype=torch.bool)
    top[order[70:]] = True
    assert torch.equal(kept(v, 0.7, 0.0), top)
    assert torch.equal(kept(v, 0.3, 1.0), ~top)
    assert GradientPruning.top_k(0.7).largest_share == 0
    assert GradientPruning.large(0.7).largest_share == 1


@pytest.mark.parametrize("defense", MEMBERS.values(), ids=MEMBERS)
def test_what_is_sent_and_what_is_remembered_make_the_whole(defense: GradientPruning) -> None:
    context, tensors = a_context(), random_tensors()
    before = {name: t.clone() for name, t in tensors.items()}
    sent = defense.update(an_update(tensors), context).tensors
    for name, v in tensors.items():
        assert torch.equal(sent[name] + context.memory["residual"][name], v)
        assert torch.equal(v, before[name])  # nothing was changed in place
        assert sent[name].dtype == v.dtype
        overlap = (sent[name] != 0) & (context.memory["residual"][name] != 0)
        assert not overlap.any()


@pytest.mark.parametrize("defense", MEMBERS.values(), ids=MEMBERS)
def test_error_feedback_delays_and_loses_nothing(defense: GradientPruning) -> None:
    context = a_context()
    rounds = [random_tensors(seed) for seed in range(5)]
    sent = [defense.update(an_update(tensors), context).tensors for tensors in rounds]
    for name in rounds[0]:
        total = sum(s[name] for s in sent) + context.memory["residual"][name]
        expected = sum(r[name] for r in rounds)
        assert isinstance(expected, torch.Tensor)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_without_error_feedback_nothing_is_remembered() -> None:
    defense = GradientPruning(error_feedback=False)
    context, tensors = a_context(), random_tensors()
    first = defense.update(an_update(tensors), context).tensors
    second = defense.update(an_update(tensors), context).tensors
    assert context.memory == {}
    assert all(torch.equal(first[name], second[name]) for name in tensors)


def test_dual_pruning_moves_the_gradient_further_than_top_k_at_equal_budget() -> None:
    tensors = random_tensors()
    top = GradientPruning.top_k(0.8).update(an_update(tensors), a_context()).tensors
    dual = GradientPruning(rate=0.8).update(an_update(tensors), a_context()).tensors
    for name, v in tensors.items():
        assert int(support(top[name]).sum()) >= int(support(dual[name]).sum())
        assert (v - dual[name]).norm() >= (v - top[name]).norm()
    assert (tensors["weight"] - dual["weight"]).norm() > 1.2 * (
        tensors["weight"] - top["weight"]
    ).norm()


def test_the_ledger_shows_a_changed_direction() -> None:
    tensors = random_tensors()
    for defense in MEMBERS.values():
        sent = defense.update(an_update(tensors), a_context()).tensors
        cosine, size = ledger(sent, tensors)
        assert cosine < 1 - 1e-3
        assert size == pytest.approx(cosine)  # a projection onto coordinates


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
@pytest.mark.parametrize("defense", MEMBERS.values(), ids=MEMBERS)
def test_the_true_batch_matches_on_the_support(
    defense: GradientPruning, protocol: Protocol
) -> None:
    view, x = observed(defense, protocol=protocol)
    g = view.update.tensors
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, dict(g))) > 0.1


def test_the_adversary_gets_gradients_through_the_mask() -> None:
    view, x = observed(GradientPruning(), model="lenet")  # sigmoids: smooth
    g = dict(view.update.tensors)

    def objective(candidate: torch.Tensor) -> torch.Tensor:
        return matching.squared_l2(view.replay(candidate, view.labels), g)

    candidate = (x + 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(objective(candidate), candidate)
    step = 1e-5 * slope / slope.norm()
    ends = [float(objective(candidate.detach() + s * step).detach()) for s in (1, -1)]
    assert float(slope.norm()) > 0
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope.norm()), rel=1e-4)


def test_the_readout_is_exact_without_and_fails_where_rows_are_touched() -> None:
    assert readout_error(None) < 1e-9
    assert readout_error(GradientPruning(rate=0)) < 1e-9
    assert readout_error(GradientPruning.large(0.2)) > 0.5
    assert readout_error(GradientPruning()) > 0.5
    assert readout_error(GradientPruning.top_k(0.8)) > 0.2


def test_error_feedback_is_declared_only_while_something_is_remembered() -> None:
    feedback = frozenset({Trait.ERROR_FEEDBACK})
    assert GradientPruning().active_traits() == feedback
    assert GradientPruning(error_feedback=False).active_traits() == frozenset()
    assert GradientPruning(rate=0).active_traits() == frozenset()


def test_the_second_round_sends_what_the_first_withheld() -> None:
    stage = build_stage(model="fc", defenses=(GradientPruning.top_k(0.9),))
    plain = build_stage(model="fc").federation.play_round().updates[0].tensors
    first = stage.federation.play_round().updates[0].tensors
    second = stage.federation.play_round().updates[0].tensors
    name = "hidden.1.weight"
    late = (first[name] == 0) & (second[name] != 0)
    assert int(late.sum()) > 0
    torch.testing.assert_close(second[name][late], 2 * plain[name][late])


def test_shares_outside_their_range_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="rate"):
        GradientPruning(rate=1.0)
    with pytest.raises(InvalidParameter, match="rate"):
        GradientPruning(rate=-0.1)
    with pytest.raises(InvalidParameter, match="largest_share"):
        GradientPruning(largest_share=1.5)


def test_twice_the_same_defense_is_refused() -> None:
    with pytest.raises(IncompatibleDefenses, match="gradient_pruning"):
        build_stage(defenses=(GradientPruning(), GradientPruning.large(0.1)))
