"""Direction, surplus, missing, and the order of the three ways to match."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import assign, best_of, pairwise_mse, psnr_of_mse


def photos(n: int, seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_four_cycle_is_undone_in_the_right_direction() -> None:
    originals = photos(4)
    cycle = [1, 2, 3, 0]  # candidate m is original cycle[m]: no transposition, so not self-inverse
    chosen = assign(pairwise_mse(originals[cycle], originals)).of_original
    assert chosen == (3, 0, 1, 2)
    assert chosen != tuple(cycle)
    index = [i for i in chosen if i is not None]
    assert torch.equal(originals[cycle][index], originals)


def test_pairwise_mse_by_hand() -> None:
    candidates = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    originals = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
    expected = torch.tensor([[0, 0.25, 1], [1, 0.25, 0]], dtype=torch.float64)
    assert torch.equal(pairwise_mse(candidates, originals), expected)


def test_an_exact_copy_costs_exactly_nothing() -> None:
    originals = photos(5, size=32)
    assert (pairwise_mse(originals, originals).diagonal() == 0).all()


@pytest.mark.parametrize("emitted", [0, 2, 4, 7])
def test_surplus_and_missing_are_counted(emitted: int) -> None:
    found = assign(torch.rand(emitted, 4))
    assert found.surplus == max(emitted - 4, 0)
    assert found.missing == max(4 - emitted, 0)
    assert sum(i is None for i in found.of_original) == found.missing
    used = [i for i in found.of_original if i is not None]
    assert len(set(used)) == len(used)


def test_a_candidate_with_nan_is_never_assigned() -> None:
    cost = torch.tensor([[torch.nan, 0.0], [5.0, 6.0]])
    assert assign(cost).of_original == (1, None)
    assert assign(torch.full((3, 2), torch.inf)).of_original == (None, None)


def test_forbidden_pairs_stay_apart_even_if_cheap() -> None:
    cost = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    crossed = torch.tensor([[False, True], [True, False]])
    assert assign(cost, allowed=crossed).of_original == (1, 0)
    only_one = torch.tensor([[False, True], [False, True]])
    assert assign(cost, allowed=only_one).of_original == (None, 1)


def test_as_many_as_possible_are_served_before_cost_counts() -> None:
    cost = torch.tensor([[0.0, 100.0], [100.0, 0.0]])
    allowed = torch.tensor([[True, True], [True, False]])
    assert assign(cost, allowed=allowed).of_original == (1, 0)


def test_5_best_of_is_at_least_hungarian_is_at_least_paired_on_average() -> None:
    totals = {"best": 0.0, "hungarian": 0.0, "paired": 0.0}
    for seed in range(20):
        originals, candidates = photos(8, seed), photos(8, 1_000 + seed)
        quality = psnr_of_mse(pairwise_mse(candidates, originals))
        cost = pairwise_mse(candidates, originals)
        columns = range(8)
        best = [quality[i, b] for b, i in zip(columns, best_of(cost), strict=True) if i is not None]
        matched = assign(cost).of_original
        one = [quality[i, b] for b, i in zip(columns, matched, strict=True) if i is not None]
        totals["best"] += float(torch.stack(best).mean())
        totals["hungarian"] += float(torch.stack(one).mean())
        totals["paired"] += float(quality.diagonal().mean())
    assert totals["best"] > totals["hungarian"] > totals["paired"]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"candidates must be \(M, 3, 4, 4\)"):
        pairwise_mse(torch.rand(2, 1, 4, 4), photos(2))
    with pytest.raises(InvalidInput, match="cost must be"):
        assign(torch.rand(3))
    with pytest.raises(InvalidInput, match="shape of cost"):
        assign(torch.rand(2, 2), allowed=torch.ones(2, 3, dtype=torch.bool))
