r"""PEFL, privacy-encoded federated learning: every weight matrix is a product of trained factors.

Liu et al., "Privacy-Encoded Federated Learning Against Gradient-Based Data Reconstruction Attacks",
IEEE TIFS 2023.

A layer's matrix is trained as a cascade, and what is sent are the gradients of the factors:

.. math:: W = W_1 W_2 \cdots W_m, \qquad
          \frac{\partial \mathcal L}{\partial W_i} = (W_1 \cdots W_{i-1})^\top \, G \,
          (W_{i+1} \cdots W_m)^\top, \qquad G = \frac{\partial \mathcal L}{\partial W} .

What an adversary does about it, with all factors *shared*: the cascade is an architecture like any
other, and its replay is exact. A fully connected first layer still gives its input in closed form:
for one image the gradient of :math:`W_m` is :math:`(W_1 \cdots W_{m-1})^\top \delta \, x^\top`, of
rank one, and :math:`\delta = \partial \mathcal L / \partial b` is sent beside it
(:func:`input_of`). With the factor next to the data kept *private*, the image is hidden up to the
unknown map between :math:`W_m` and the factor that the adversary would guess: one matrix, which
surrogate data teach.

Departures (closed access and no code; this is rebuilt from the abstract):
    * Factors start balanced: all have the m-th roots of the matrix's singular values, and random
      rotations between them that cancel in the product.
    * A convolution is a convolution to the inner channels, followed by 1x1 ones. Grouped ones are
      left as they are.
    * The inner width counts in units of the matrix's rank, not of its inputs: with 1 the product is
      the matrix, with less it is the best approximation of that rank, another network.
    * Which factor stays private was not read: it is the one next to the data, drawn on each device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakatlas.errors import UnsupportedModel
from leakatlas.fl import ActsOn, Defense
from leakatlas.models.structure import replace_module


@dataclass(frozen=True, kw_only=True)
class PEFL(Defense):
    """Replaces linear and convolutional layers by cascades of factors.

    Args:
        factors: Factors m of every matrix; 1 leaves the model alone.
        width: Inner width, in units of the matrix's largest possible rank.
        private_factor: ``none`` (all are shared), or ``input``: the one next to the data stays on
            the client.
    """

    key: ClassVar[str] = "pefl"
    knob: ClassVar[str] = "factors"
    neutral: ClassVar[int] = 1
    strengths: ClassVar[tuple[int, ...]] = (2, 3, 4)
    stage: ClassVar[int] = 20
    modes: ClassVar[frozenset[ActsOn]] = frozenset({ActsOn.PER_STEP, ActsOn.PER_UPDATE})

    factors: Annotated[int, Field(ge=1, le=8)] = 2
    width: Annotated[float, Field(gt=0, le=8)] = 1.0
    private_factor: Literal["none", "input"] = "none"

    def model(self, model: nn.Module) -> nn.Module:
        """A copy with cascades; the rotations between factors are drawn anew at every call.

        Raises:
            UnsupportedModel: If there is no layer to factorise.
        """
        if self.factors == 1:
            return model
        names = factorisable(model)
        if not names:
            raise UnsupportedModel(
                f"PEFL factorises torch.nn.Linear and ungrouped torch.nn.Conv2d layers inside the "
                f"model, and {type(model).__name__} has none; use another defense."
            )
        defended = copy.deepcopy(model)
        for name in names:
            layer = defended.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            replace_module(defended, name, cascade(layer, self.factors, self.width))
        return defended

    def private(self, model: nn.Module) -> frozenset[str]:
        """The factors next to the data, where they stay on the client."""
        if self.private_factor == "none":
            return frozenset()
        return frozenset(
            f"{name}.0.weight" for name, m in model.named_modules() if isinstance(m, Cascade)
        )


class Cascade(nn.Sequential):
    """The factors of one layer, in the order in which data pass them: W_m first, W_1 last."""


def factorisable(model: nn.Module) -> tuple[str, ...]:
    """Names of linear layers and ungrouped convolutions inside a model."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name
        and (
            isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        )
    )


def cascade(layer: nn.Linear | nn.Conv2d, factors: int, width: float) -> Cascade:
    """Layers that compute what ``layer`` does, if ``width`` is 1 or more.

    Args:
        layer: Is not changed.
        factors: m > 1.
        width: Inner width over the smaller side of the layer's matrix.
    """
    W = layer.weight.detach().flatten(1)
    inner = max(1, math.ceil(width * min(W.shape)))
    matrices = balanced(W, factors, inner)
    bias = layer.bias is not None
    made: list[nn.Module] = []
    for position, matrix in enumerate(reversed(matrices)):
        biased = bias and position == factors - 1
        rows, columns = matrix.shape
        part: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Linear):
            part = nn.Linear(columns, rows, bias=biased)
        elif position:
            part = nn.Conv2d(columns, rows, 1, bias=biased)
        else:  # reads what the layer read
            part = copy.deepcopy(layer)
            part.out_channels, part.bias = rows, nn.Parameter(torch.zeros(rows)) if biased else None
            part.weight = nn.Parameter(matrix.reshape(rows, *layer.weight.shape[1:]).clone())
        part.to(layer.weight)
        with torch.no_grad():
            part.weight.copy_(matrix.reshape(part.weight.shape))
            if part.bias is not None and layer.bias is not None:
                part.bias.copy_(layer.bias)
        made.append(part)
    return Cascade(*made)


def balanced(W: Tensor, factors: int, inner: int) -> list[Tensor]:
    """``[W_1, ..., W_m]`` with equal singular values, whose product is W, or near it.

    Args:
        W: ``(rows, columns)``.
        factors: m.
        inner: Width h between factors; below W's rank the product is W's best approximation.
    """
    # On the CPU, where the turns are drawn and double precision is at hand.
    U, S, Vh = torch.linalg.svd(W.detach().cpu().double(), full_matrices=False)
    r = min(inner, len(S))
    root = S[:r].pow(1 / factors)
    turns = [_orthonormal(inner, r) for _ in range(factors - 1)]
    left = [U[:, :r], *turns]
    right = [*(q.T for q in turns), Vh[:r]]
    return [torch.mm(a * root, b).to(W) for a, b in zip(left, right, strict=True)]


def _orthonormal(rows: int, columns: int) -> Tensor:
    """``(rows, columns)`` with orthonormal columns in random directions."""
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]
    return q


def input_of(update: Mapping[str, Tensor], layer: str, weights: Sequence[Tensor]) -> Tensor:
    r"""The closed form: the one image behind the gradients of a fully connected cascade.

    :math:`x = \mathrm{row}_j(\partial W_m) / ((W_1 \cdots W_{m-1})^\top \delta)_j` at the largest
    divisor.

    Args:
        update: Gradients by name, with ``{layer}.0.weight`` and the bias of the last factor.
        layer: Name of the cascade.
        weights: ``[W_1, ..., W_{m-1}]``, all factors but the one next to the data.
    """
    delta = update[f"{layer}.{len(weights)}.bias"]
    for W in weights:
        delta = W.T @ delta
    row = int(delta.abs().argmax())
    x: Tensor = update[f"{layer}.0.weight"][row] / delta[row]
    return x
