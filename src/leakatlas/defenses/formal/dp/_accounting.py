r"""Epsilon of the (subsampled) Gaussian mechanism, through Opacus' accountants.

Without subsampling, T compositions of noise multiplier z are one Gaussian mechanism of
multiplier :math:`z/\sqrt T`, whose privacy curve is known exactly (Balle and Wang, "Improving the
Gaussian Mechanism for Differential Privacy", ICML 2018, Theorem 8); with
:math:`\mu = \sqrt T / z`

.. math:: \delta(\varepsilon) = \Phi(\mu/2 - \varepsilon/\mu)
          - e^{\varepsilon}\, \Phi(-\mu/2 - \varepsilon/\mu).

It is used at sampling rate 1, where the numerical accountant's privacy loss divides by zero.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from leakatlas.errors import InvalidParameter, Unavailable

Accountant = Literal["prv", "rdp"]
"""Numerical composition (tight, within 0.01), or Rényi bounds (looser)."""


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Smallest delta of the Gaussian mechanism with sensitivity / noise = ``mu``."""
    from scipy import special  # a third of a second to import

    tail = math.exp(epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu)))
    return float(special.ndtr(mu / 2 - epsilon / mu)) - tail


def gaussian_epsilon(delta: float, mu: float) -> float:
    """Smallest epsilon at ``delta``: the inverse of :func:`gaussian_delta`."""
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2.0
    from scipy import optimize  # half a second to import

    return float(optimize.brentq(lambda e: gaussian_delta(e, mu) - delta, 0.0, high))


def epsilon(
    noise_multiplier: float,
    *,
    steps: int,
    delta: float,
    sampling_rate: float = 1.0,
    accountant: Accountant = "prv",
) -> float:
    """Epsilon after ``steps`` compositions, for adding or removing one unit.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        steps: Compositions T.
        delta: In (0, 1).
        sampling_rate: Probability with which a unit joins a step, by *Poisson* sampling; cohorts
            or batches of a fixed size are not that, so say 1 for them.
        accountant: Which bound.

    Raises:
        InvalidParameter: If a value is outside its range.
        Unavailable: If Opacus is needed and not installed.
    """
    if not 0.0 < delta < 1.0 or not 0.0 < sampling_rate <= 1.0 or steps < 0:
        raise InvalidParameter(
            f"epsilon(steps={steps}, delta={delta}, sampling_rate={sampling_rate}): expected "
            "steps >= 0, 0 < delta < 1 and 0 < sampling_rate <= 1."
        )
    if steps == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    if sampling_rate == 1.0 and accountant == "prv":
        return gaussian_epsilon(delta, math.sqrt(steps) / noise_multiplier)
    book = _opacus_accountant(accountant)
    book.history = [(noise_multiplier, sampling_rate, steps)]
    return float(book.get_epsilon(delta=delta))


def _opacus_accountant(name: Accountant) -> Any:
    try:
        from opacus import accountants
    except ModuleNotFoundError:
        raise missing_opacus("epsilon under subsampling or Rényi accounting") from None
    return accountants.PRVAccountant() if name == "prv" else accountants.RDPAccountant()


def missing_opacus(purpose: str) -> Unavailable:
    """The error for what needs Opacus, with the command that gets it."""
    return Unavailable(
        f"{purpose} needs Opacus, which is not installed: pip install 'leakatlas[opacus]'"
    )
