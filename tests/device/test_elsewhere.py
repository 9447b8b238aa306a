"""The pretended device refuses what a GPU refuses, and computes what the CPU computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.device.elsewhere import REAL, Elsewhere, Mixed, pretended

pytestmark = pytest.mark.skipif(bool(REAL), reason="a real device needs nobody to pretend")

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a sum": lambda there: there + torch.ones(3),
    "a sum into the cpu": lambda there: torch.ones(3).add_(there),
    "joined": lambda there: torch.stack([there[0], torch.tensor(1.0)]),
    "indexed on the cpu by an index of the device": lambda there: torch.ones(3)[there > 0],
    "a draw": lambda there: torch.randn(3, device=there.device),
    "a draw like": lambda there: torch.rand_like(there),
    "dropout": lambda there: F.dropout(there),
    "numpy": lambda there: there.numpy(),
    "a layer": lambda there: nn.Linear(3, 2)(there),
}


@pytest.mark.parametrize("mixed", REFUSED.values(), ids=REFUSED)
def test_tensors_of_two_devices_never_meet(mixed: Callable[[Tensor], object]) -> None:
    with pretended() as device:
        there = torch.tensor([1.0, 2.0, 3.0], device=device)
        with pytest.raises(Mixed):
            mixed(there)


def test_what_a_gpu_allows_is_allowed() -> None:
    with pretended() as device:
        there = torch.tensor([1.0, 2.0, 3.0], device=device)
        assert (there * torch.tensor(2.0)).tolist() == [2, 4, 6]
        assert there[torch.tensor([0, 2])].tolist() == there[[0, 2]].tolist() == [1, 3]
        assert float(there[1]) == 2 and there.cpu().numpy().tolist() == [1, 2, 3]
        assert torch.zeros(3).copy_(there).tolist() == [1, 2, 3]
        for made in (there.new_tensor([1]), torch.zeros_like(there), there.new_zeros(2)):
            assert isinstance(made, Elsewhere) and made.device == device


def test_slopes_views_and_copies_follow() -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 4))

    def second(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        g = torch.autograd.grad(
            F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True
        )
        (slope,) = torch.autograd.grad(torch.stack([t.square().sum() for t in g]).sum(), x)
        return slope

    here = second(copy.deepcopy(model), x, torch.tensor([0, 1]))
    with pretended() as device:
        moved = copy.deepcopy(model).to(device)
        there = second(moved, x.to(device), torch.tensor([0, 1], device=device))
        assert there.device == device
        assert torch.equal(there.cpu(), here)
        wave = torch.fft.rfft2(x.to(device))
        assert torch.equal(
            (wave * wave.conj()).cpu(), torch.fft.rfft2(x) * torch.fft.rfft2(x).conj()
        )
        narrow = copy.deepcopy(moved).double().float()
        assert torch.equal(narrow(x.to(device)).cpu(), moved(x.to(device)).cpu())
        part = x.to(device)
        part[0].zero_()
        assert float(part[0].abs().sum()) == 0 and float(part[1].abs().sum()) > 0
