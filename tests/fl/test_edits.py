"""The blocks that a client builds from data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.fl import edits

DOUBLE = torch.float64


def _x(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


W = torch.full((48,), 1 / 48, dtype=DOUBLE)
EDGES = torch.linspace(0.2, 0.8, 7, dtype=DOUBLE)


def test_cumulative_rows_fire_above_their_threshold() -> None:
    weight, bias = edits.binning_rows(W, EDGES, "cumulative")
    x = _x(20, 48)
    fires = x @ weight.T + bias > 0
    assert torch.equal(fires, x.mean(dim=1)[:, None] > EDGES[:-1])


def test_sparse_rows_are_inside_the_tanh_only_in_their_bin() -> None:
    weight, bias = edits.binning_rows(W, EDGES, "sparse")
    x = _x(20, 48)
    z = x @ weight.T + bias
    inside = (z > 0) & (z < 1)
    h = x.mean(dim=1)[:, None]
    assert torch.equal(inside, (h > EDGES[:-1]) & (h < EDGES[1:]))
    assert bool((inside.sum(dim=1) <= 1).all())


@pytest.mark.parametrize("form", ["cumulative", "sparse"])
@pytest.mark.parametrize("gain", [1.0, 1e-3, 50.0])
def test_the_block_keeps_shape_and_size_whatever_the_gain(form: edits.Form, gain: float) -> None:
    x = _x(9, 3, 4, 4)
    plain = edits.Imprint(W, EDGES, form=form).layers()(x)
    scaled = edits.Imprint(W, EDGES, form=form, gain=gain).layers()(x)
    assert plain.shape == x.shape and torch.allclose(plain, scaled)
    assert float(plain.detach().abs().max()) < 5
    added = edits.Imprint(W, EDGES, form=form, gain=gain, connection="addition").layers()(x)
    assert torch.allclose(added, x + plain)


def test_columns_of_w2_are_equal_and_released_scale_is_one_over_gain() -> None:
    block = edits.Imprint(W, EDGES, gain=4.0, spread=None).layers()
    weight = dict(block.named_parameters())["second.weight"].detach()
    assert bool((weight == 0.25).all())


def test_every_client_has_its_own_channels() -> None:
    x = _x(5, 3, 4, 4)
    blocks = [
        edits.SplitImprint(
            W, EDGES, shape=(3, 4, 4), clients=3, group=g, kappa=10.0, anchor=True
        ).layers()
        for g in range(3)
    ]
    for group, block in enumerate(blocks):
        features = block.conv(x).detach().reshape(5, 3, 4, 4, 4)
        assert torch.allclose(features[:, group, :3], 10 * x)
        assert bool((features[:, group, 3] == 10).all())
        others = [g for g in range(3) if g != group]
        assert bool((features[:, others] == 0).all())
    outputs = [block(x).detach() for block in blocks]
    assert torch.allclose(outputs[0], outputs[1]) and torch.allclose(outputs[0], outputs[2])
    plain = edits.Imprint(W, EDGES, form="sparse").layers()(x)
    assert torch.allclose(outputs[0], plain)
