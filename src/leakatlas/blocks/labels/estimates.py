"""Counts from dummy or public statistics: ZLG for one step, Dimitrov for FedAVG.

References:
    Geng et al., "Towards General Deep Leakage in Federated Learning", 2021 (ZLG).
    Dimitrov, Balunović, Konstantinov and Vechev, "Data Leakage in Federated Averaging", TMLR 2022.

Departures: the bias form (no division by a feature sum) is offered beside the published weight
form. Features are the input of the last Linear, not the output of the last activation module.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leakatlas.blocks.labels.counts import counts_from_bias, counts_from_weight
from leakatlas.blocks.labels.moments import HeadPass, mean_feature_sum, mean_probability_of
from leakatlas.errors import InvalidInput, InvalidParameter

Points = Literal["start", "end", "average"]


def zlg(weight_grad: Tensor, seen: HeadPass, batch_size: int) -> Tensor:
    """``B (p_c - G_c / s)`` with p and s from dummy inputs, real-valued ``(K,)``.

    Raises:
        UnsupportedModel: If the features change sign so that s is near 0.
    """
    p, s = mean_probability_of(seen), mean_feature_sum(seen)
    return counts_from_weight(weight_grad, p, s, batch_size)


def zlg_bias(bias_grad: Tensor, seen: HeadPass, batch_size: int) -> Tensor:
    """The bias form of :func:`zlg`, ``B (p_c - g_c)``: no feature sum, any activation."""
    return counts_from_bias(bias_grad, mean_probability_of(seen), batch_size)


def interpolation_points(steps: int, points: Points) -> Tensor:
    """Coefficients j/T, j = 0..T-1, at which the statistics are interpolated.

    The last one is (T-1)/T: the last step starts there, not at the client's final weights.
    """
    if steps < 1:
        raise InvalidInput(f"interpolation_points: steps must be positive, got {steps}.")
    every = torch.arange(steps, dtype=torch.float64) / steps
    if points == "average":
        return every
    if points == "start":
        return every[:1]
    if points == "end":
        return every[-1:]
    raise InvalidParameter(f"points={points!r}: expected 'start', 'end' or 'average'.")


def dimitrov(
    weight_grad: Tensor,
    start: HeadPass,
    end: HeadPass,
    *,
    steps: int,
    samples: int,
    points: Points = "average",
) -> Tensor:
    """Counts over a client's whole set from a FedAVG update, real-valued ``(K,)``.

    Mean probability and feature sum move from their values at the global weights to those at the
    client's; the mean of ``N (p_j - G / s_j)`` over the local steps is the estimate. One step is
    :func:`zlg`.

    Args:
        weight_grad: Head gradient averaged over steps, ``(theta_0 - theta_T) / (eta T)``.
        start: Dummy inputs at the global weights.
        end: The same inputs at the client's weights.
        steps: Local steps T.
        samples: Samples N of the client (of one epoch).
        points: Which steps enter: the first, the last, or all.
    """
    p0, s0 = mean_probability_of(start), mean_feature_sum(start)
    p1, s1 = mean_probability_of(end), mean_feature_sum(end)
    at = interpolation_points(steps, points)
    return torch.stack(
        [
            counts_from_weight(weight_grad, p0 + t * (p1 - p0), s0 + t * (s1 - s0), samples)
            for t in at.to(p0.device)
        ]
    ).mean(dim=0)


def dimitrov_bias(
    bias_grad: Tensor,
    start: HeadPass,
    end: HeadPass,
    *,
    steps: int,
    samples: int,
    points: Points = "average",
) -> Tensor:
    """The bias form of :func:`dimitrov`; arguments as there, with the bias gradient ``(K,)``."""
    p0, p1 = mean_probability_of(start), mean_probability_of(end)
    t = interpolation_points(steps, points).mean().to(p0.device)
    return counts_from_bias(bias_grad, p0 + t * (p1 - p0), samples)
