from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.perturbation.svdefense import (
    SVDefense,
    cut_alike,
    entropy,
    rank,
    truncated,
)
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol
from tests.conftest import relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    an_update,
    ledger,
    observed,
    random_tensors,
    readout_error,
    replayed,
)


def _with_singular_values(*values: float, rows: int = 6, columns: int = 9) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64))[0]
    S = torch.tensor(values, dtype=torch.float64)
    made: Tensor = (U[:, : len(S)] * S) @ V[: len(S)]
    return made


def test_the_rank_is_the_least_that_holds_the_energy() -> None:
    S = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)  # energies 9, 4, 1 of 14
    assert [rank(S, t) for t in (1e-6, 9 / 14, 0.65, 13 / 14, 0.95)] == [1, 1, 2, 2, 3]


def test_without_weights_it_is_the_best_approximation_of_its_rank() -> None:
    M = _with_singular_values(3, 2, 1)
    sent = truncated(M, 0.9, 0.0)  # 13 of 14
    assert int(torch.linalg.matrix_rank(sent)) == 2
    assert float((M - sent).norm()) == pytest.approx(1.0)  # Eckart and Young: what was cut


def test_the_energy_kept_is_at_least_the_threshold_and_one_direction_less_would_be_too_little() -> (
    None
):
    M = random_tensors()["weight"]
    for threshold in (0.3, 0.6, 0.9):
        sent = truncated(M, threshold, 0.0)
        r = int(torch.linalg.matrix_rank(sent))
        squares = torch.linalg.svdvals(M).square()
        shares = squares.cumsum(0) / squares.sum()
        assert float(shares[r - 1]) >= threshold
        assert r == 1 or float(shares[r - 2]) < threshold


def test_weights_spare_the_channels_that_matter() -> None:
    """A strong row and weak ones: with weights the same rank keeps the strong row better."""
    draw = torch.Generator().manual_seed(3)
    M = torch.randn(8, 40, generator=draw, dtype=torch.float64)
    M[0] *= 1.5

    def lost(gamma: float) -> float:
        sent = truncated(M, 0.5, gamma)
        return float((sent[0] - M[0]).norm() / M[0].norm())

    assert lost(3.0) < 0.5 * lost(0.0)


def test_a_client_of_few_directions_keeps_less() -> None:
    one = {"w": _with_singular_values(1, 0.01)}
    many = {"w": _with_singular_values(1, 1, 1, 1, 1, 1)}
    assert entropy(many) == pytest.approx(1.0)
    assert entropy(one) < 0.01
    assert entropy({"w": _with_singular_values(1)}) == pytest.approx(0.0, abs=1e-9)
    assert entropy({"b": torch.ones(4), "w": torch.zeros(3, 3)}) == 1.0  # nothing to tell
    defense = SVDefense(energy=0.8, adaptivity=1.0)
    assert defense.threshold(many) == pytest.approx(0.8)
    assert defense.threshold(one) == pytest.approx(0.64, abs=0.01)
    assert SVDefense(energy=0.8, adaptivity=0.0).threshold(one) == pytest.approx(0.8)


def test_vectors_and_zeros_are_sent_as_they_are() -> None:
    tensors = random_tensors() | {"dead": torch.zeros(3, 4, dtype=torch.float64)}
    sent = SVDefense().update(an_update(tensors), a_context()).tensors
    for name in ("bias", "ties", "zeros", "one", "dead"):
        assert torch.equal(sent[name], tensors[name])
    for name in ("weight", "conv"):
        assert sent[name].shape == tensors[name].shape
        assert not torch.allclose(sent[name], tensors[name])


def test_a_dead_channel_stays_dead() -> None:
    M = random_tensors()["weight"].clone()
    M[3] = 0
    assert not truncated(M, 0.5, 0.5)[3].any()


def test_the_ledger_shows_a_changed_direction() -> None:
    tensors = random_tensors()
    cosine, size = ledger(SVDefense().update(an_update(tensors), a_context()).tensors, tensors)
    assert 0.5 < cosine < 1 - 1e-3
    assert size < 1


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_true_batch_matches(gamma: float, protocol: Protocol) -> None:
    view, x = observed(SVDefense(energy=0.7, channel_weight=gamma), protocol=protocol)
    g = view.update.tensors
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, dict(g))) > 0.03


def test_the_mirror_cuts_a_candidate_to_the_rank_that_is_seen() -> None:
    M, seen = random_tensors()["weight"], truncated(random_tensors(1)["weight"], 0.5, 0.5)
    cut = cut_alike(M, seen, 0.5)
    assert int(torch.linalg.matrix_rank(cut)) == int(torch.linalg.matrix_rank(seen))
    torch.testing.assert_close(cut_alike(seen, seen, 0.5), seen)
    assert not cut_alike(M, torch.zeros_like(M), 0.5).any()
    # What a candidate has beside the observed directions is compared, not forgiven.
    assert float((cut - seen).norm()) > 0.5 * float(seen.norm())


def test_the_adversary_descends_through_the_mirror() -> None:
    """The slope passes as if nothing were cut, so it is no exact one; it leads down."""
    view, x = observed(SVDefense(), model="lenet")
    g = dict(view.update.tensors)

    def objective(candidate: Tensor) -> Tensor:
        return matching.squared_l2(view.replay(candidate, view.labels), g)

    candidate = (x + 0.1).requires_grad_()
    (slope,) = torch.autograd.grad(objective(candidate), candidate)
    step = 1e-3 * slope / slope.norm()
    before, after = (objective(candidate.detach() - s * step).detach() for s in (0, 1))
    assert float(after) < float(before)


def test_the_mirror_lets_slopes_pass_in_directions_that_were_cut() -> None:
    M, seen = random_tensors()["weight"], truncated(random_tensors(1)["weight"], 0.5, 0.5)
    leaf = M.clone().requires_grad_()
    (slope,) = torch.autograd.grad((cut_alike(leaf, seen, 0.5) * seen).sum(), leaf)
    torch.testing.assert_close(slope, seen)


def test_the_mirror_of_a_dead_or_diverged_candidate_says_so_and_does_not_crash() -> None:
    seen = truncated(random_tensors()["weight"], 0.5, 0.5)
    assert not cut_alike(torch.zeros_like(seen), seen, 0.5).any()
    assert bool(cut_alike(torch.full_like(seen, torch.nan), seen, 0.5).isnan().all())


def test_one_image_behind_a_linear_layer_leaks_at_any_threshold() -> None:
    """Its gradient has rank one: there is nothing to cut."""
    assert readout_error(SVDefense(energy=0.01)) < 1e-9


def test_thresholds_outside_their_range_are_refused_by_name() -> None:
    for wrong in (0.0, 1.5):
        with pytest.raises(InvalidParameter, match="energy"):
            SVDefense(energy=wrong)
