r"""Distances between two updates: how far a replayed update is from the observed one.

An update is a mapping from parameter names to tensors. Every distance takes the replay ``a``
first and the observation ``b`` second, runs over the names of ``b``, and returns a scalar that is
0 where they agree and is differentiable in ``a``, there included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput

Tensors = Mapping[str, Tensor]
Distance = Callable[[Tensors, Tensors], Tensor]

ROOT_EPSILON = 1e-12
"""Added under a root, whose slope at 0 is infinite."""


def squared_l2(a: Tensors, b: Tensors) -> Tensor:
    r""":math:`\sum_l \lVert a_l - b_l \rVert^2` [Zhu et al., 2019]."""
    return _squares([x - y for x, y in _pairs(a, b)])


def relative_l2(a: Tensors, b: Tensors) -> Tensor:
    r""":math:`\lVert a - b \rVert^2 / \lVert b \rVert^2` over all tensors jointly.

    Unlike the cosine it sees the norm; unlike :func:`squared_l2` it has no unit, so one prior
    weight suits fresh and trained models. An all-zero ``b`` has nothing to be relative to and
    gives NaN or infinity.
    """
    return squared_l2(a, b) / _squares(list(b.values()))


def cosine(a: Tensors, b: Tensors) -> Tensor:
    r""":math:`1 - \langle a, b\rangle / (\lVert a\rVert \lVert b\rVert)`, all tensors joined.

    Blind to a positive factor on either side; 2 for opposite updates [Geiping et al., 2020]. An
    all-zero side gives NaN: it has no direction.
    """
    pairs = _pairs(a, b)
    ones, others = [x for x, _ in pairs], [y for _, y in pairs]
    inner, square = _Products.apply(len(pairs), *ones, *others)
    distance: Tensor = 1 - inner / (square.sqrt() * _squares(others).sqrt())
    return distance


def layerwise_l2(a: Tensors, b: Tensors) -> Tensor:
    r""":math:`\sum_l \lVert a_l - b_l \rVert_2`, not squared [Yin et al., 2021]."""
    return _total(norm(x - y) for x, y in _pairs(a, b))


def norm(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    r""":math:`\sqrt{\sum x^2 + \epsilon} - \sqrt{\epsilon}`: 0 at 0, with slope 0 there.

    Args:
        x: Any shape.
        dim: Dimensions to sum over; all if None.
    """
    return torch.sqrt(x.square().sum(dim) + ROOT_EPSILON) - math.sqrt(ROOT_EPSILON)


def subset(distance: Distance, names: Iterable[str]) -> Distance:
    """The same distance over some tensors only.

    Raises:
        InvalidInput: If no name is left.
    """
    chosen = tuple(names)
    if not chosen:
        raise InvalidInput("matching.subset needs at least one tensor name, got none.")

    def restricted(a: Tensors, b: Tensors) -> Tensor:
        return distance({n: a[n] for n in chosen}, {n: b[n] for n in chosen})

    return restricted


def masked(distance: Distance, masks: Tensors) -> Distance:
    """The same distance over some entries only, as for a pruned update.

    Args:
        distance: On whole tensors.
        masks: 1 (or True) where an entry counts, by name; a name without a mask counts entirely.
    """

    def restricted(a: Tensors, b: Tensors) -> Tensor:
        return distance(_apply(masks, a, b), _apply(masks, b, b))

    return restricted


def largest(b: Tensors, count: int) -> tuple[str, ...]:
    """Names of the ``count`` tensors of largest norm, largest first."""
    order = sorted(b, key=lambda name: float(b[name].norm()), reverse=True)
    return tuple(order[:count])


def _apply(masks: Tensors, a: Tensors, names: Tensors) -> dict[str, Tensor]:
    return {n: a[n] * masks[n].to(a[n].dtype) if n in masks else a[n] for n in names}


def _pairs(a: Tensors, b: Tensors) -> list[tuple[Tensor, Tensor]]:
    missing = [name for name in b if name not in a]
    if missing or not b:
        raise InvalidInput(
            f"matching compares tensors by name; the replay lacks {missing[0]!r}."
            if missing
            else "matching needs an observed update, got one without tensors."
        )
    return [(a[name], b[name]) for name in b]


class _Products(torch.autograd.Function):
    r""":math:`\langle a, b\rangle` and :math:`\lVert a\rVert^2` over n tensors each.

    Their derivative in a, c b + 2 d a, is formed in one pass. The tape would make four of it, and
    a network's gradient is the largest thing in a matching step: 45 MB for ResNet-18.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(n: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, b = tensors[:n], tensors[n:]
        inner = _total((x * y).sum() for x, y in zip(a, b, strict=True))
        return inner, _total((x * x).sum() for x in a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.n = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, c: Tensor, d: Tensor) -> Any:
        a, b = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        slopes = (torch.addcmul(y * c, x, 2 * d) for x, y in zip(a, b, strict=True))
        return None, *slopes, *([None] * ctx.n)


class _Squares(torch.autograd.Function):
    """Sum of squares over all tensors, with its derivative 2 c a in one pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*a: Tensor) -> Tensor:
        return _total((x * x).sum() for x in a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        return tuple(x * (2 * c) for x in ctx.saved_tensors)


def _squares(a: list[Tensor]) -> Tensor:
    total: Tensor = _Squares.apply(*a)
    return total


def _total(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
