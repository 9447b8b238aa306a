r"""The target of one example under other losses than plain softmax cross-entropy.

With one example the head's gradients are :math:`g_b = \delta` and :math:`g_W = \delta h^\top` with
:math:`\delta = \partial \mathcal L / \partial z`, so that :math:`h = g_W^\top \delta / |\delta|^2`
and :math:`z = W h + b` are known, and the loss itself says which target gives :math:`\delta`:

===============================  ==============================================================
NLL after a (log-)softmax        the class is where :math:`\delta_k < 0`, whatever z is
BCE                              :math:`y = \sigma(z) - K \delta`
MSE                              :math:`y = z - K \delta / 2`
any other                        the class whose own :math:`\delta` is the observed one
===============================  ==============================================================

Exact up to rounding if the head is the last layer; a loss that agrees with no class is refused.
Batches of several examples are a matter of counts, which the identity behind
:mod:`~leakatlas.blocks.labels.counts` gives for plain cross-entropy alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leakatlas.blocks.labels.head import Head
from leakatlas.blocks.labels.signs import idlg
from leakatlas.errors import UnsupportedModel
from leakatlas.fl.losses import BCE, MSE, NLL, PLAIN, Loss

AGREES = 1e-2
"""Relative distance of a class's own delta from the observed one that float32 explains."""


def require_plain(loss: Loss, who: str) -> None:
    """Refuse what a rule of plain softmax cross-entropy cannot read.

    Raises:
        UnsupportedModel: With the way out.
    """
    if loss != PLAIN:
        raise UnsupportedModel(
            f"{who} rests on plain softmax cross-entropy; this client minimises "
            f"{loss.describe()}. Grant the labels, or attack the update of a single example."
        )


def target_of_one(
    loss: Loss, gradients: Mapping[str, Tensor], head: Head, model: nn.Module
) -> Tensor:
    """The target behind the gradient of one example.

    Args:
        loss: What the client minimises.
        gradients: By parameter name.
        head: The model's head.
        model: Holding the weights at which the gradient was taken.

    Returns:
        ``(1,)`` class, or ``(1, K)`` targets for losses that take vectors.

    Raises:
        UnsupportedModel: If the head has no bias where one is needed, or no class explains the
            gradient.
    """
    if loss == PLAIN or isinstance(loss, NLL):
        return idlg(gradients, head)
    delta = head.bias_grad(gradients).double()
    size = delta.square().sum()
    if not bool(size > 0):
        raise UnsupportedModel("The head's gradient is zero, so it holds no target.")
    h = delta @ head.weight_grad(gradients).double() / size
    named = {name: p.detach().double() for name, p in model.named_parameters()}
    z = named[head.weight_name] @ h
    if head.bias_name is not None:
        z = z + named[head.bias_name]
    if isinstance(loss, BCE) and loss.positive_weights is None:
        exact = z.sigmoid() - len(z) * delta
        near = exact.round()
        return torch.where((exact - near).abs() < AGREES, near, exact)[None].float()
    if isinstance(loss, MSE):
        return (z - len(z) * delta / 2)[None].float()
    apart = [_distance(loss, z, k, delta) for k in range(len(z))]
    best = min(range(len(z)), key=apart.__getitem__)
    if apart[best] > AGREES:
        raise UnsupportedModel(
            f"No class explains the head's gradient under {loss.describe()} (the nearest is off by "
            f"{apart[best]:.0%}); grant the labels."
        )
    return torch.tensor([best], device=delta.device)


def _distance(loss: Loss, z: Tensor, label: int, delta: Tensor) -> float:
    with torch.enable_grad():
        leaf = z.detach()[None].requires_grad_()
        value = loss(leaf, torch.tensor([label], device=z.device))
        (own,) = torch.autograd.grad(value, leaf)
    return float((own[0] - delta).norm() / delta.norm())
