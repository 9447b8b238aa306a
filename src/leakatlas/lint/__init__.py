"""Client-side detection of tampered models: was the model I received made to leak?

:func:`lint` runs the checks D1 to D17 that a client can make of a received model, its own batch
and its own update, and gives a :class:`Verdict` with the evidence in words. :class:`LintGuard`
is a client that refuses a round on an alarm. The thresholds were measured on benign models
(``studies/lint``; see :mod:`leakatlas.lint.thresholds`).
"""

from __future__ import annotations

import sys
import types
from typing import Any

from leakatlas.lint.consistency import RoundFacts
from leakatlas.lint.examine import dynamics, lint, measure
from leakatlas.lint.findings import STATISTICS, Finding, Score, Verdict
from leakatlas.lint.guard import LintGuard
from leakatlas.lint.published import Dynamics
from leakatlas.lint.thresholds import Calibration
from leakatlas.lint.thresholds import shipped as calibration

__all__ = [
    "STATISTICS",
    "Calibration",
    "Dynamics",
    "Finding",
    "LintGuard",
    "RoundFacts",
    "Score",
    "Verdict",
    "calibration",
    "dynamics",
    "lint",
    "measure",
]


class _CallableRoom(types.ModuleType):
    """Lets ``leakatlas.lint(model)`` work although this room has the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Verdict:
        return lint(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableRoom
