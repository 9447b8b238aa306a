"""Turning what was sent into what the rules expect: the mean gradient of one step.

Count rules are not scale-invariant, and their own constraint cannot fix the scale, since bias
gradients sum to 0 whatever it is. Every helper maps gradients by parameter name to the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput

Gradients = dict[str, Tensor]


def scaled(gradients: Mapping[str, Tensor], factor: float) -> Gradients:
    """Every gradient times ``factor``."""
    return {name: g * factor for name, g in gradients.items()}


def mean_from_sum(gradients: Mapping[str, Tensor], batch_size: int) -> Gradients:
    """Undo a sum-reduced loss: divide by B."""
    if batch_size < 1:
        raise InvalidInput(f"mean_from_sum: batch_size must be positive, got {batch_size}.")
    return scaled(gradients, 1.0 / batch_size)


def effective_steps(steps: int, momentum: float = 0.0) -> float:
    """How many plain gradients ``steps`` SGD steps with heavy-ball momentum add up to.

    Gradient s is applied ``1 + mu + ... + mu^(T-s)`` times, so T steps weigh
    ``sum_s (1 - mu^(T-s+1)) / (1 - mu)``; without momentum that is T.
    """
    if steps < 1 or not 0 <= momentum < 1:
        raise InvalidInput(
            f"effective_steps: needs steps >= 1 and 0 <= momentum < 1, got {steps}, {momentum}."
        )
    return sum((1 - momentum**k) / (1 - momentum) for k in range(1, steps + 1))


def mean_from_delta(
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    lr: float,
    steps: int = 1,
    momentum: float = 0.0,
) -> Gradients:
    """The mean gradient of T local SGD steps, ``(theta_0 - theta_T) / (eta T)``.

    Its sign is the gradient's: start minus end. Exact for one step; for several, a weighted mean
    of gradients at weights that moved.

    Args:
        start: Global weights.
        end: The client's weights after training, by the same names.
        lr: Learning rate eta.
        steps: T.
        momentum: Heavy-ball momentum of the local SGD, buffers starting at 0.
    """
    if lr <= 0:
        raise InvalidInput(f"mean_from_delta: lr must be positive, got {lr}.")
    missing = sorted(set(start) ^ set(end))
    if missing:
        raise InvalidInput(f"mean_from_delta: {missing[0]!r} is in one of the two states only.")
    scale = 1.0 / (lr * effective_steps(steps, momentum))
    return {name: (start[name] - end[name]) * scale for name in start}


def without_weight_decay(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], weight_decay: float
) -> Gradients:
    """Subtract the known term ``lambda theta`` that L2 weight decay adds to every gradient."""
    return {name: g - weight_decay * weights[name] for name, g in gradients.items()}


def clip_scale(bias_grad: Tensor, mean_probability: Tensor) -> float:
    """Estimate the factor kappa by which an update was scaled, from a class that is absent.

    An absent class has ``g_c = kappa p_c``, every other one less, so ``max_c g_c / p_c`` is kappa
    if some class is absent and the mean probability is right. Divide the update by it. 1 if no
    entry is positive.
    """
    ratio = bias_grad.double() / mean_probability.double().clamp(min=1e-12)
    largest = float(torch.nan_to_num(ratio, nan=0.0).max())
    return largest if largest > 0 else 1.0
