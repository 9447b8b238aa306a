from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leakatlas.blocks import surgery
from leakatlas.errors import UnsupportedModel
from leakatlas.models import build

DOUBLE = torch.float64


def _x(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_trap_rows_have_the_fingerprint() -> None:
    traps = surgery.trap_rows(
        6,
        31,
        scaling=0.9,
        sigma=0.5,
        generator=torch.Generator().manual_seed(0),
        like=torch.empty(0, dtype=DOUBLE),
    )
    assert traps.shape == (6, 31) and traps.dtype == DOUBLE
    for row in traps:
        negative, positive = row[row < 0].neg().sort().values, row[row > 0].sort().values
        assert len(negative) == len(positive) == 15
        assert torch.allclose(positive / negative, torch.full((15,), 0.9, dtype=DOUBLE))
    assert bool((traps.sum(dim=1) < 0).all())


def test_which_traps_fire_does_not_depend_on_their_size() -> None:
    x = _x(30, 40)
    fired = [
        x @ surgery.trap_rows(
            20, 40, scaling=0.95, sigma=s, generator=torch.Generator().manual_seed(1), like=x
        ).T > 0
        for s in (0.1, 5.0)
    ]  # fmt: skip
    assert torch.equal(*fired)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (5, 2, 2, 1), (4, 2, 0, 1), (3, 1, "same", 1), (2, 1, "valid", 1)],
)
def test_copying_kernels_copy(kernel: int, stride: int, padding: int | str, dilation: int) -> None:
    conv = nn.Conv2d(3, 5, kernel, stride=stride, padding=padding, dilation=dilation).double()
    surgery.copying_kernels(conv, 3, gain=[1.0, 2.0, 0.5], shift=[0.0, 0.1, 0.2])
    x = _x(2, 3, 9, 9)
    y = conv(x).detach()
    height, width = y.shape[2:]
    expected = x[:, :, ::stride, ::stride][:, :, :height, :width]
    factor = torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE)[:, None, None]
    shift = torch.tensor([0.0, 0.1, 0.2], dtype=DOUBLE)[:, None, None]
    assert torch.allclose(y[:, :3], expected * factor + shift)
    assert bool((y[:, 3:] == 0).all())


def test_too_narrow_a_convolution_cannot_copy() -> None:
    with pytest.raises(UnsupportedModel, match="cannot carry 3 channels"):
        surgery.copying_kernels(nn.Conv2d(3, 2, 3), 3, gain=[1.0] * 3, shift=[0.0] * 3)


class _Odd(nn.Module):
    """One functional step between two modules."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.first, self.second, self.step = nn.Linear(12, 12), nn.Linear(12, 2), step

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(x.size(0), -1)
        h = self.first(flat)
        if self.step == "relu":
            h = torch.relu(h)
        elif self.step == "residual":
            h = h + flat
        logits: Tensor = self.second(h)
        return logits * 2 if self.step == "scale" else logits


def test_a_chain_is_followed_through_views() -> None:
    links = surgery.chain(_Odd("none"), torch.zeros(1, 3, 2, 2))
    assert [link.name for link in links] == ["first", "second"]
    assert links[0].input_shape == (12,) and links[1].output_shape == (2,)
    names = [type(link.module).__name__ for link in surgery.chain(build("lenet"), _example())]
    assert names == ["Conv2d", "Sigmoid"] * 3 + ["Linear"]


@pytest.mark.parametrize(
    ("step", "place"),
    [("relu", "between first and second"), ("residual", "between first and second"),
     ("scale", "between second and the output")],
)  # fmt: skip
def test_a_break_is_named(step: str, place: str) -> None:
    with pytest.raises(UnsupportedModel, match=place):
        surgery.chain(_Odd(step), torch.zeros(1, 3, 2, 2))


def test_following_leaves_the_model_as_it_was() -> None:
    model = build("convnet-bn").train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    surgery.chain(model, _example())
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def _example() -> Tensor:
    return torch.zeros(1, 3, 32, 32)
