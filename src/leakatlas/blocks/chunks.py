"""The gradient of a large batch, a few examples at a time, still differentiable in the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from leakatlas.errors import InvalidInput
from leakatlas.fl import View

Replay = Callable[[Tensor, Tensor], dict[str, Tensor]]


def in_chunks(replay: Replay, size: int, view: View) -> Replay:
    """The same mean gradient, a few examples at a time, differentiable in the images.

    A first pass adds up gradients without a graph. When the derivative v of the loss in the
    gradient is known, a second one sends v back through every piece: the memory of one piece.

    Args:
        replay: Of a single gradient.
        size: Examples of a piece.
        view: Says whether pieces can be told apart.

    Raises:
        InvalidInput: If the client took local steps, or its normalisation mixes examples.
    """
    mixing = any(isinstance(m, _BatchNorm) and m.training for m in view.model.modules())
    if view.update.kind != "gradient" or mixing:
        why = "mixes examples in batch normalisation" if mixing else "took local steps"
        raise InvalidInput(
            f"E2EGI(chunk={size}): the client {why}, so its update is no sum over pieces of the "
            "batch; leave `chunk` out."
        )
    mean = view.update.reduction == "mean"

    def whole(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        names = list(view.update.tensors)
        found = _Chunked.apply(replay, names, size, mean, x, y)
        return dict(zip(names, found, strict=True))

    return whole


class _Chunked(torch.autograd.Function):
    """A sum of gradients over pieces of the batch, whose graph is built a piece at a time."""

    @staticmethod
    def forward(
        ctx: Any, replay: Replay, names: list[str], size: int, mean: bool, x: Tensor, y: Tensor
    ) -> Any:
        ctx.replay, ctx.names, ctx.size, ctx.mean = replay, names, size, mean
        ctx.save_for_backward(x, y)
        total: list[Tensor] | None = None
        for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
            share = len(x_part) / len(x) if mean else 1.0
            with torch.enable_grad():
                piece = replay(x_part.detach(), y_part)
            scaled = [piece[name].detach() * share for name in names]
            total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
        return tuple(total or ())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *v: Tensor) -> Any:
        x, y = ctx.saved_tensors
        slopes = []
        for x_part, y_part in zip(x.split(ctx.size), y.split(ctx.size), strict=True):
            share = len(x_part) / len(x) if ctx.mean else 1.0
            with torch.enable_grad():
                leaf = x_part.detach().requires_grad_()
                piece = ctx.replay(leaf, y_part)
                outputs = [piece[name] for name in ctx.names]
                (slope,) = torch.autograd.grad(outputs, leaf, [share * t for t in v])
            slopes.append(slope)
        return None, None, None, None, torch.cat(slopes), None
