"""The generator that draws a first image from one row of the head's gradient."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import models
from leakatlas.blocks import labels, observed
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.models.structure import example_input


def fit(
    r: Tensor,
    u: Tensor,
    *,
    width: int,
    lr: float,
    epochs: int,
    generator: torch.Generator,
    watch: Watch,
) -> dict[str, Tensor]:
    """``generator/...`` as pairs teach it, with ``mean`` and ``size`` of a row's entries.

    Args:
        r: Rows ``(P, d)``.
        u: Their images ``(P, C, H, W)``.
        width: Channels of its last inner layer.
        lr: Adam's step size.
        epochs: Passes over the pairs.
        generator: Of their order; weights come from the global one.
        watch: Budget and progress.
    """
    mean, size = r.mean(0), r.std(0, correction=0)
    size = torch.where(size > 0, size, torch.ones_like(size))  # never sent: says nothing
    r = (r - mean) / size
    network = RowGenerator(r.shape[1], width, tuple(u.shape[1:])).to(r)
    engine = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in watch.steps(epochs):
        for places in torch.randperm(len(r), generator=generator).split(32):
            if len(places) < 2:  # batch normalisation needs two
                continue
            loss = F.binary_cross_entropy(network(r[places]), u[places].clamp(0, 1))
            engine.zero_grad()
            loss.backward()
            engine.step()
    state = {f"generator/{n}": t.detach() for n, t in network.state_dict().items()}
    return {**state, "mean": mean, "size": size}


def find_head(view: View) -> labels.Head:
    """The layer that reads the features and gives the logits."""
    return labels.find_head(view.model, example_input(view.model, view.input_shape))


def rows(view: View, y: Tensor) -> Tensor:
    """The row of the head's gradient ``(N, d)`` that belongs to each label (the likeliest)."""
    chosen = y if y.dim() == 1 else y.argmax(1)
    return find_head(view).weight_grad(observed.mean_gradient(view))[chosen]


def part(learned: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one network of a lesson."""
    prefix = f"{name}/"
    return {n.removeprefix(prefix): t for n, t in learned.items() if n.startswith(prefix)}


class RowGenerator(nn.Module):
    """Rows ``(N, d)`` to images ``(N, C, H, W)`` in [0, 1], by transposed convolutions.

    Args:
        features: d.
        width: Channels of the last inner layer; eight times as many come first.
        shape: ``(C, H, W)``.
    """

    def __init__(self, features: int, width: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.side = tuple(shape[1:])
        sizes = (features, 8 * width, 4 * width, 2 * width, width, shape[0])
        layers: list[nn.Module] = []
        for depth, (a, b) in enumerate(itertools.pairwise(sizes)):
            step = (1, 0) if depth == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(a, b, 4, *step, bias=False), nn.BatchNorm2d(b)]
            layers += [nn.Sigmoid() if depth == len(sizes) - 2 else nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, r: Tensor) -> Tensor:
        """Images of rows."""
        made: Tensor = self.body(r[:, :, None, None])
        return F.adaptive_max_pool2d(made, self.side)

    @classmethod
    def of(cls, learned: Mapping[str, Tensor], shape: tuple[int, ...]) -> RowGenerator:
        """The network of a lesson."""
        features, wide = learned["body.0.weight"].shape[:2]
        network = cls(features, wide // 8, shape)
        models.apply_state(network, learned, source="the learned generator")
        return network.eval()
