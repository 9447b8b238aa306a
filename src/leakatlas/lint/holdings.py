"""Which statistics a client can compute with what it holds, and the detectors that are compared."""

from __future__ import annotations

from leakatlas.lint.findings import COMPARISONS, STATISTICS

CALIBRATED = tuple(name for name in STATISTICS if name not in COMPARISONS)
"""Statistics whose thresholds are measured."""


def of(*checks: str) -> frozenset[str]:
    """The statistics of some checks."""
    return frozenset(s for s in STATISTICS if s.split("/")[0] in checks)


CHECKS = tuple(dict.fromkeys(s.split("/")[0] for s in STATISTICS if not s.startswith("D13/")))
"""All checks but D13, which needs facts of the protocol."""

WEIGHTS = of("D2", "D3", "D4", "D5", "D6", "D7", "D15") - {"D7/saturation"} | {"D1/detour"}
BATCH = WEIGHTS | {"D7/saturation"} | of("D8", "D9", "D10", "D14")
REFERENCE = BATCH | of("D1", "D11", "D16", "D17")

HOLDINGS = {
    "weights": WEIGHTS,
    "weights, batch": BATCH,
    "weights, batch, reference": REFERENCE,
    "weights, batch, reference, other clients": REFERENCE | of("D12"),
}
"""By what the client holds."""

PUBLISHED = of("D15", "D16", "D17")

DETECTORS = {
    "D1-D14, weights": WEIGHTS - PUBLISHED,
    "D1-D14, weights and batch": BATCH - PUBLISHED,
    "D1-D14, also the model before": REFERENCE - PUBLISHED,
    "2511.10502, weights (D15)": of("D15"),
    "2511.10502, loss and gradient (D16)": of("D16"),
    "2511.10502, both": of("D15", "D16"),
    "2506.20651, the model before (D17)": of("D17"),
    "all together": REFERENCE,
}
"""Our own checks by what they need, and the published ones as they are rebuilt here."""

LEVELS = tuple(
    (held, at) for held in ("weights", "weights, batch") for at in (0.0, 0.25, 0.75, 0.9)
)
"""Points of the ROC: 0 is the largest benign value, 0.5 the threshold in use, 1 certainty.

Only what is held without comparisons, which have no level.
"""
