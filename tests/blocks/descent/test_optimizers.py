"""L-BFGS for several candidates at once is PyTorch's for each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import descent
from leakatlas.blocks.descent import Variables
from leakatlas.blocks.descent.optimizers import BatchedLBFGS
from leakatlas.blocks.watch import Watch


def rosenbrock(variables: Variables, t: Tensor) -> Tensor:
    del t
    x = variables["x"]
    return ((1 - x[:-1]).square() + 10 * (x[1:] - x[:-1].square()).square()).sum()


@pytest.mark.parametrize("inner", [1, 4])
@pytest.mark.parametrize("history", [3, 50])
def test_each_candidate_moves_as_under_pytorch(inner: int, history: int) -> None:
    generator = torch.Generator().manual_seed(0)
    start = 0.3 * torch.randn(5, 4, dtype=torch.float64, generator=generator)
    factory = descent.lbfgs(0.3, history=history, inner=inner)
    together = descent.descend(
        rosenbrock, {"x": start}, candidates=5, optimizer=factory, steps=6, watch=Watch()
    )
    for index in range(5):
        alone = descent.descend(
            rosenbrock, {"x": start[index]}, optimizer=factory, steps=6, watch=Watch()
        )
        torch.testing.assert_close(
            together.last["x"][index], alone.last["x"], rtol=1e-9, atol=1e-12
        )


def test_two_variables_of_different_shape_share_one_curvature() -> None:
    def objective(variables: Variables, t: Tensor) -> Tensor:
        del t
        return (variables["a"].sum() - variables["b"].sum() - 1).square() + variables[
            "a"
        ].square().sum()

    start = {
        "a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.ones(2, 2, 2, dtype=torch.float64)
    }  # fmt: skip
    factory = descent.lbfgs()
    together = descent.descend(
        objective, start, candidates=2, optimizer=factory, steps=1, watch=Watch()
    )
    alone = descent.descend(
        objective, {n: t[0] for n, t in start.items()}, optimizer=factory, steps=1, watch=Watch()
    )
    for name in start:
        torch.testing.assert_close(together.last[name][1], alone.last[name], rtol=1e-8, atol=1e-10)


def test_a_candidate_at_its_minimum_rests_while_another_moves() -> None:
    def bowl(variables: Variables, t: Tensor) -> Tensor:
        del t
        return variables["x"].square().sum()

    start = {"x": torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)}
    end = descent.descend(
        bowl, start, candidates=2, optimizer=descent.lbfgs(), steps=2, watch=Watch()
    )
    assert end.last["x"][0].tolist() == [0, 0]
    assert float(end.last["x"][1].norm()) < 1e-12


def test_state_goes_on_exactly() -> None:
    def run(optimizer: BatchedLBFGS, x: Tensor, steps: int) -> None:
        def closure() -> Tensor:
            leaf = x.detach().requires_grad_()
            total = sum((rosenbrock({"x": row}, torch.zeros(())) for row in leaf), torch.zeros(()))
            (x.grad,) = torch.autograd.grad(total, leaf)
            return total.detach()

        for _ in range(steps):
            optimizer.step(closure)

    start = torch.tensor([[0.1, 0.2], [0.3, -0.1]], dtype=torch.float64)
    whole = start.clone()
    run(BatchedLBFGS([whole], 2, lr=0.2, inner=2, history=4), whole, 6)
    half = start.clone()
    first = BatchedLBFGS([half], 2, lr=0.2, inner=2, history=4)
    run(first, half, 3)
    second = BatchedLBFGS([half], 2, lr=9.0, inner=2, history=4)
    second.load_state_dict(first.state_dict())
    run(second, half, 3)
    assert torch.equal(half, whole)
