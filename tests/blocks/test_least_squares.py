from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import least_squares
from leakatlas.errors import InvalidInput


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_full_rank_systems_are_solved_exactly() -> None:
    a, x = _randn(12, 7), _randn(7, seed=1)
    found = least_squares.solve(a, a @ x)
    assert found.full_rank and found.rank == 7 and found.residual < 1e-12
    assert torch.allclose(found.x, x)


@pytest.mark.parametrize(("m", "n"), [(5, 9), (12, 9)])
def test_deficient_systems_give_the_shortest_solution(m: int, n: int) -> None:
    a = _randn(m, 4) @ _randn(4, n, seed=1)
    b = a @ _randn(n, seed=2)
    found = least_squares.solve(a, b)
    assert found.rank == 4 and not found.full_rank and found.residual < 1e-6
    assert torch.allclose(found.x, torch.linalg.pinv(a) @ b, atol=1e-6)


def test_contradictions_stay_in_the_residual() -> None:
    a, b = _randn(20, 3), _randn(20, seed=1)
    found = least_squares.solve(a, b)
    expected = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    assert torch.allclose(found.x, expected)
    assert found.residual == pytest.approx(float((a @ expected - b).norm() / b.norm()))


@pytest.mark.parametrize(("rows", "full"), [(9, True), (4, True), (1, False)])
def test_shared_constraints_agree_with_the_stacked_system(rows: int, full: bool) -> None:
    """Three channels of six positions share K; W of 8 rows mixes the channels."""
    k, weights, x = _randn(rows, 6), _randn(3, 8, 6, seed=1), _randn(3, 6, seed=2)
    z = torch.einsum("crp,cp->r", weights, x)

    def apply(directions: Tensor, channel: int) -> Tensor:
        return directions @ weights[channel].T

    found = least_squares.solve_shared(k, x @ k.T, apply, z)
    stacked = torch.cat([torch.block_diag(k, k, k), torch.cat(list(weights), dim=1)])
    assert found.rank == int(torch.linalg.matrix_rank(stacked)) and found.full_rank == full
    if full:
        assert torch.allclose(found.x, x, atol=1e-9)
    assert found.residual < 1e-6


def test_weakly_determined_directions_are_not_lost() -> None:
    """One direction of K is 1e-5 of the largest, and W is blind to it: the gradient still tells."""
    k = torch.diag(torch.tensor([1.0, 1.0, 1e-5], dtype=torch.float64))
    weight = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    x = _randn(1, 3)
    found = least_squares.solve_shared(
        k, x @ k.T, lambda d, channel: d @ weight.T, (x @ weight.T)[0]
    )
    assert found.full_rank and torch.allclose(found.x, x, atol=1e-9)


def test_bad_systems_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"A \(m, n\)"):
        least_squares.solve(torch.ones(3, 2), torch.ones(2))
    with pytest.raises(InvalidInput, match="non-finite"):
        least_squares.solve(torch.full((2, 2), torch.nan), torch.ones(2))
