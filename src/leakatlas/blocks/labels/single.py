r"""One sample: soft labels by the ratio of weight to bias gradient, and R-GAP's scalar rule.

References:
    Wang, Liang and He, "Towards Eliminating Hard Label Constraints in Gradient Inversion Attacks",
    ICLR 2024 (soft labels).
    Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021.

Departures: R-GAP's released code assumes the label known and runs an optimizer from 0, which lands
on the smaller root; here the margin is solved for directly and both roots are returned.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from leakatlas.blocks.labels import _checks
from leakatlas.errors import InvalidInput, InvalidParameter


def fc_features(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """The features of a single sample, ``h = G_c / g_c`` at the largest ``|g_c|``, ``(D,)``."""
    c = int(bias_grad.abs().argmax())
    if float(bias_grad[c]) == 0:
        raise InvalidInput(
            "fc_features: the bias gradient is 0 everywhere; the sample is fitted exactly and its "
            "gradient carries nothing."
        )
    return weight_grad[c].double() / bias_grad[c].double()


def fc_soft_label(weight_grad: Tensor, bias_grad: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The label of a single sample, smoothed and mixed ones included: exact, ``(K,)`` float64.

    ``y = softmax(W h + b) - g`` with ``h`` from :func:`fc_features`.
    """
    h = fc_features(weight_grad, bias_grad)
    return (weight.double() @ h + bias.double()).softmax(dim=0) - bias_grad.double()


def soft_label_without_bias(
    weight_grad: Tensor, weight: Tensor, *, structure: Literal["smoothed", "mixed"]
) -> Tensor:
    """The soft label of a single sample from a head without bias, ``(K,)`` float64.

    The gradient has rank one, which gives the features up to a factor; the factor is the first one
    at which the label has the structure it is known to have.

    Args:
        weight_grad: ``(K, D)`` of one sample.
        weight: The head's weight ``(K, D)``.
        structure: ``"smoothed"``: equal mass off the target (hard labels included). ``"mixed"``:
            at most two classes with mass.

    Raises:
        InvalidInput: If no factor gives such a label, or there are fewer than four classes, too
            few for the structure to single one out.
    """
    _checks.matrix("soft_label_without_bias", weight_grad)
    if structure not in ("smoothed", "mixed"):
        raise InvalidParameter(f"structure={structure!r}: expected 'smoothed' or 'mixed'.")
    if len(weight_grad) < 4:
        raise InvalidInput(
            f"soft_label_without_bias: needs at least 4 classes, got {len(weight_grad)}."
        )
    u, s, vt = torch.linalg.svd(weight_grad.double(), full_matrices=False)
    if float(s[0]) == 0:
        raise InvalidInput("soft_label_without_bias: the gradient is 0 and carries nothing.")
    residual_direction = (u[:, 0] * s[0]).cpu().numpy()
    scores = (weight.double() @ vt[0]).cpu().numpy()

    def label(factor: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        z = factor * scores
        p = np.exp(z - z.max())
        y: np.ndarray[tuple[int], np.dtype[np.float64]] = p / p.sum() - residual_direction / factor
        return y

    def misfit(log_factor: float, sign: float) -> float:
        ordered = np.sort(label(sign * math.exp(log_factor)))
        rest = ordered[:-1] - ordered[:-1].mean() if structure == "smoothed" else ordered[:-2]
        return float(np.square(rest).sum())

    from scipy.optimize import minimize_scalar  # half a second to import

    # small factors blow the misfit up and huge ones send it to 0 along with p - one-hot, so the
    # first true zero from below is the answer
    grid = np.linspace(math.log(1e-4 * float(s[0])), math.log(1e4), 4_000)
    zeros: list[tuple[float, float]] = []
    for sign in (1.0, -1.0):
        values = np.array([misfit(t, sign) for t in grid])
        for i in np.flatnonzero((values[1:-1] <= values[:-2]) & (values[1:-1] <= values[2:])) + 1:
            found = minimize_scalar(
                misfit, bounds=(grid[i - 1], grid[i + 1]), args=(sign,), method="bounded",
                options={"xatol": 1e-14},
            )  # fmt: skip
            if found.fun < 1e-14 and label(sign * math.exp(found.x)).min() > -1e-6:
                zeros.append((float(found.x), sign))
                break
    if not zeros:
        raise InvalidInput(
            f"soft_label_without_bias: no factor gives a {structure} label; is this the gradient "
            "of a single sample?"
        )
    t, sign = min(zeros)
    return torch.from_numpy(label(sign * math.exp(t))).to(weight_grad.device)


MARGIN_AT_MINIMUM = 1.2784645427610738
"""The positive root of ``1 + e^u = u e^u``: where ``-u / (1 + e^u)`` is least."""

SMALLEST_PRODUCT = -MARGIN_AT_MINIMUM / (1 + math.exp(MARGIN_AT_MINIMUM))
"""That least value, -0.27846."""


def rgap_product(margin: float) -> float:
    """``sum_j w_j dL/dw_j = -u / (1 + e^u)`` for logistic loss at margin ``u = y z``."""
    return -margin / (1 + math.exp(margin)) if margin < 700 else 0.0


def rgap_margins(product: float) -> tuple[float, ...]:
    """All margins u with this product, ascending: one if ``product >= 0``, else two.

    The two roots of a negative product belong to a weakly and a strongly right prediction; the
    gradient alone cannot tell them apart.

    Raises:
        InvalidInput: If the product is below -0.2785, which no margin gives.
    """
    if not product >= SMALLEST_PRODUCT - 1e-12:
        raise InvalidInput(
            f"rgap_margins: the product of weight and gradient must be at least "
            f"{SMALLEST_PRODUCT:.4f}, got {product:.4g}; is the loss logistic on a scalar output?"
        )
    if product >= 0:
        return (_root(product, -(product + 2.0), 0.0),)
    if product <= SMALLEST_PRODUCT:
        return (MARGIN_AT_MINIMUM, MARGIN_AT_MINIMUM)
    return (
        _root(product, 0.0, MARGIN_AT_MINIMUM),
        _root(product, MARGIN_AT_MINIMUM, 720.0),
    )


def _root(product: float, low: float, high: float) -> float:
    from scipy.optimize import brentq  # half a second to import, and few runs need it

    return float(brentq(lambda u: rgap_product(u) - product, low, high, xtol=1e-14, rtol=1e-14))


def rgap_label(weight_grad: Tensor) -> int:
    """The label +1 or -1 of one sample with non-negative features: minus the gradient's sign."""
    total = float(weight_grad.double().sum())
    if total == 0:
        raise InvalidInput("rgap_label: the gradient sums to 0 and carries no sign.")
    return -1 if total > 0 else 1
