r"""Two published client-side detectors as further checks, D15 to D17.

D15, D16: Carletti, Foggia, Mazzocca, Parrella, Vento, "On the Detectability of Active Gradient
Inversion Attacks in Federated Learning" (IEEE S&P 2026, arXiv 2511.10502): "statistically
improbable weight structures", and "anomalous loss and gradient dynamics". D17: Wang, Li, "Hear No
Evil: Detecting Gradient Leakage by Malicious Servers in Federated Learning" (arXiv 2506.20651): a
"client-side detection mechanism that flags suspicious model updates before local training begins".

**Reconstructed**: only the abstracts and the opening of a review of the first could be read, which
says that an imprint's rows are one direction and its biases quantiles. Statistics and thresholds
of the papers are not known; the measured rates are those of these reconstructions.

Departures:

* D15: rows that nobody made have no preferred direction, and for two of them
  :math:`\cos^2 \sim \mathrm{Beta}(1/2, (n-1)/2)`. Training already makes that improbable, so that
  the median row's largest cosine is the statistic, and what chance would give is said beside it.
  The second handcrafted attack of the paper has no test, since what is looked for is not known.
* D16: rises in units of the earlier rounds' own spread, on logarithms, after at least
  :data:`EARLIER` rounds. Only rises count: honest training lets both fall, at any pace. The
  gradient is taken in units of the weights, so that no rescaling of layers moves it.
* D17: what is compared is the direction of every layer, for the same reason.
* Thresholds follow the rule of all other checks (:mod:`leakatlas.lint.thresholds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from leakatlas.lint.findings import Score, share_of
from leakatlas.lint.layers import Anatomy, Layer, norms
from leakatlas.lint.static import FEWEST, sample, some

LEVEL = 1e-6
"""Chance gives so close a pair anywhere in a layer only so often."""

EARLIER = 3
"""Dynamics are judged after so many rounds."""

STEADY = 0.1
"""Spread of a logarithm below which a history counts as this steady: ten per cent."""


@dataclass(frozen=True)
class Dynamics:
    """What a client keeps of a round (:func:`leakatlas.lint.dynamics`).

    Args:
        loss: Of the received model on its batch, in nats.
        gradient: :func:`~leakatlas.lint.behaviour.relative_size` of the batch gradient.
    """

    loss: float
    gradient: float


def d15_improbable_rows(layer: Layer) -> list[Score]:
    """D15: how close the median row is to the row next to it in direction, as ``|cos|``."""
    if not layer.linear:
        return []
    unit = sample(layer)
    m, n = unit.shape
    if m < FEWEST or n < FEWEST:
        return []
    cosine = (unit @ unit.T).abs()
    cosine.fill_diagonal_(0)
    nearest = min(float(cosine.amax(dim=1).median()), 1.0)
    pairs = m * (m - 1) / 2
    from scipy import stats  # most of a second to import

    chance = math.sqrt(float(stats.beta.isf(LEVEL / pairs, 0.5, (n - 1) / 2)))
    words = (
        f"the median row is as close as {nearest:.3f} to another (cosine; chance stays below "
        f"{chance:.3f} in all but one of {1 / LEVEL:,.0f} layers)"
    )
    return [Score("D15/improbable", layer.name, nearest, words)]


def d16_dynamics(now: Dynamics, history: Sequence[Dynamics]) -> list[Score]:
    """D16: how far loss and gradient rose over the earlier rounds', z as ``z / (3 + z)``.

    Args:
        now: Of the received model.
        history: Of the models of earlier rounds, on the same examples.
    """
    if len(history) < EARLIER:
        return []
    scores = []
    for statistic, name, value, earlier in (
        ("D16/loss", "loss", now.loss, [h.loss for h in history]),
        ("D16/gradient", "gradient", now.gradient, [h.gradient for h in history]),
    ):
        z = _rise(value, earlier)
        words = f"{name} {value:.3g} is {z:.3g} deviations above the earlier rounds'"
        scores.append(Score(statistic, "", share_of(z / 3), words))
    return scores


def _rise(value: float, earlier: Sequence[float]) -> float:
    tiny = torch.finfo(torch.float64).tiny
    logs = torch.tensor([max(v, tiny) for v in (*earlier, value)], dtype=torch.float64).log()
    rise = float(logs[-1] - logs[:-1].mean()) / max(float(logs[:-1].std()), STEADY)
    return max(rise, 0.0) if math.isfinite(rise) else rise


def d17_change(body: Anatomy, previous: Anatomy) -> list[Score]:
    r"""D17: how far a layer turned since the previous round, and whether it was there at all.

    :math:`\sqrt{1 - \cos}` of the layers, :math:`|a - b| / \sqrt 2` at length 1: 0 if nothing
    turned, 1 if the received layer has nothing in common with the one before.
    """
    before = {layer.parameter: layer for layer in previous.layers}
    turns = [(_turn(layer, before.get(layer.parameter)), layer.name) for layer in body.layers]
    worst, place = max(turns, key=lambda turn: turn[0] if math.isfinite(turn[0]) else math.inf)
    new = [x.name for x in body.layers if x.parameter not in before]
    what = f"not there before: {some(new)}" if new else f"changed by {worst:.0%} of itself"
    return [Score("D17/change", place, worst, what)]


def _turn(layer: Layer, before: Layer | None) -> float:
    if before is None or before.weight.shape != layer.weight.shape:
        return 1.0
    size, size_before = _length(layer), _length(before)
    if size == 0 or size_before == 0:
        return 0.0  # from zero, or to it, there is no direction
    few = layer.chunk()
    pairs = zip(layer.rows.split(few), before.rows.split(few), strict=True)
    cosine = sum(
        float((layer.sized(a) / size * (before.sized(b) / size_before)).sum()) for a, b in pairs
    )
    turn = 1 - cosine
    return math.sqrt(min(max(turn, 0.0), 1.0)) if math.isfinite(turn) else turn


def _length(layer: Layer) -> float:
    return float(norms(layer.norms()[None]))
