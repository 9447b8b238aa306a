"""When a reconstruction counts as a success.

Three kinds, never mixed: *exact* (a copy up to rounding), *recognisable* (a threshold on a stated
measure) and the event of the Bayes-risk framework (a ball of stated radius).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.errors import InvalidInput
from leakatlas.metrics import _checks

EXACT_FLOAT32 = 1e-3
EXACT_FLOAT64 = 1e-6
"""Relative errors up to which an image is exact when gradients had this precision."""

THRESHOLDS = (15.0, 18.0, 19.0, 20.0, 25.0, 30.0)
"""PSNR thresholds in dB that published work counts from."""


def relative_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """``||x_hat - x|| / ||x||`` an image, ``(N,)``; the plain norm where ``x`` is all zeros."""
    _checks.pair("relative_error", x_hat, x)
    difference: Tensor = torch.linalg.vector_norm(x_hat.double() - x.double(), dim=(1, 2, 3))
    size: Tensor = torch.linalg.vector_norm(x.double(), dim=(1, 2, 3))
    return difference / torch.where(size > 0, size, torch.ones_like(size))


def exact(x_hat: Tensor, x: Tensor, *, eps: float = EXACT_FLOAT32) -> Tensor:
    """``exact@eps``: is the relative L2 error at most ``eps``? ``(N,)`` boolean."""
    return torch.le(relative_error(x_hat, x), eps)


def pixel_exact(x_hat: Tensor, x: Tensor) -> Tensor:
    """Are all 8-bit pixels equal? ``(N,)`` boolean."""
    _checks.pair("pixel_exact", x_hat, x)
    return ((255 * x_hat.double()).round() == (255 * x.double()).round()).flatten(1).all(dim=1)


def in_ball(x_hat: Tensor, x: Tensor, *, radius: float) -> Tensor:
    """``||x_hat - x|| <= radius`` in pixel units, ``(N,)``: the success event of Bayes bounds."""
    _checks.pair("in_ball", x_hat, x)
    return torch.le(torch.linalg.vector_norm(x_hat.double() - x.double(), dim=(1, 2, 3)), radius)


def asr(values: Tensor, *, tau: float) -> float:
    """Attack success rate: share of originals whose value is at least ``tau``.

    Args:
        values: One value an original, ``(B,)``; NaN marks a failure and counts against the rate.
        tau: Threshold in the unit of ``values`` (dB for PSNR).
    """
    if values.numel() == 0:
        raise InvalidInput("asr: needs the value of at least one original, got none.")
    return float((values >= tau).double().mean())


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """Exact outputs among all that an attack emitted.

    Args:
        outputs: Candidates emitted.
        exact: Candidates that are exact copies of some original (duplicates included).
        unique: Originals with at least one exact copy.
        recall: ``unique`` over the number of originals.
        precision: ``exact`` over ``outputs``; None when nothing was emitted.
    """

    outputs: int
    exact: int
    unique: int
    recall: float
    precision: float | None


def recovered(relative_errors: Tensor, *, eps: float = EXACT_FLOAT32) -> Recovered:
    """Count exact outputs from the relative errors of all pairs, ``(M, B)``.

    Non-finite entries are not exact. Two equal originals are both recovered by one copy: what was
    private about either is out.
    """
    if relative_errors.ndim != 2 or relative_errors.shape[1] == 0:
        raise InvalidInput(
            f"recovered: expected errors (M, B) with B > 0, got {tuple(relative_errors.shape)}."
        )
    hit = relative_errors <= eps
    outputs, originals = hit.shape
    exact_outputs, unique = int(hit.any(dim=1).sum()), int(hit.any(dim=0).sum())
    return Recovered(
        outputs=outputs,
        exact=exact_outputs,
        unique=unique,
        recall=unique / originals,
        precision=exact_outputs / outputs if outputs else None,
    )
