"""Scores of the checks, what becomes of them, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

STATISTICS: dict[str, str] = {
    "D1/reference": "names, shapes or module types differ from the reference",
    "D1/detour": "two linear layers in front of the model, from the image and back to it",
    "D2/partners": "share of rows that are parallel to another row",
    "D2/rank": "one over the stable rank",
    "D3/spread": "spread of the biases against the size of the weights",
    "D3/quantiles": "evenness of the thresholds against Normal, Laplace and uniform quantiles",
    "D4/zeros": "share of exact zeros",
    "D4/constant": "share of the most frequent value",
    "D5/fingerprint": "sorted positive over sorted negative weights are one constant",
    "D5/row_sums": "share of rows with a sum of the same sign, beyond chance",
    "D6/tap": "share of the largest tap in a kernel",
    "D7/zero_rows": "share of head rows that are exactly zero",
    "D7/row_norms": "largest head row against the median one, columns at one size",
    "D7/biases": "range of the head's biases against its rows",
    "D7/saturation": "confidence of the wrong predictions",
    "D8/d_snr": "share of the largest per-example gradient norm",
    "D9/alone": "share of the active neurons that answer to one example alone",
    "D10/zero_rows": "share of gradient rows that are exactly zero",
    "D10/zero_columns": "longest run of zero gradient columns",
    "D10/top_row": "energy share of the largest gradient row",
    "D10/rank": "one over the effective rank of the gradient",
    "D11/loss": "loss above chance and above the previous model's",
    "D11/gradient": "gradient norm against the previous model's",
    "D12/others": "other clients received another model",
    "D13/noise": "own noise does not give the promised epsilon",
    "D13/cohort": "cohort too small, or with unattested members",
    "D14/hidden": "own examples read from rows, beyond what chance weights give away",
    "D14/head": "own features read from head rows, beyond what chance weights give away",
    "D15/improbable": "closeness of the median row to another one",
    "D16/loss": "rise of the loss over the earlier rounds', in their own deviations",
    "D16/gradient": "rise of the gradient over the earlier rounds', in their own deviations",
    "D17/change": "how far a layer turned since the previous round",
}
"""Every statistic and what it measures; each lies in [0, 1], and 1 is certainty."""

COMPARISONS = frozenset({"D1/reference", "D12/others", "D13/noise", "D13/cohort"})
"""Yes-or-no statistics: 0 or 1, never calibrated."""

MECHANISMS = (
    ({"D2", "D3", "D4", "D6"}, "binning attack with columns per client, of the [32]/[33] kind"),
    ({"D2", "D3"}, "binning attack of the [28]/[33] kind"),
    ({"D5/fingerprint"}, "trap weights of the [30]/[31] kind"),
    ({"D7/zero_rows"}, "a head that singles out one class or example, of the [29] kind"),
    ({"D1", "D2"}, "part of an inserted measuring layer"),
    ({"D2", "D6"}, "class decoupling of the [34] kind"),
    ({"D14"}, "gradient rows that hold single examples, whatever the attack is called"),
)
"""Which checks or statistics together speak for which mechanism; the first that fits is named."""

ELSEWHERE = frozenset({"D1", "D6"})
"""Evidence from another layer: an insertion, or kernels that copy for the rows that measure."""


@dataclass(frozen=True)
class Score:
    """One statistic at one place.

    Args:
        statistic: A key of :data:`STATISTICS`.
        place: Layer name; empty for the model as a whole.
        value: In [0, 1].
        words: The evidence for people, without the place.
    """

    statistic: str
    place: str
    value: float
    words: str

    @property
    def check(self) -> str:
        """``D1`` ... ``D17``."""
        return self.statistic.partition("/")[0]


def share_of(size: float) -> float:
    """``size / (1 + size)``: from [0, infinity] to [0, 1]."""
    return 1.0 if math.isinf(size) else size / (1 + size)


@dataclass(frozen=True)
class Finding:
    """A score above its threshold.

    Args:
        score: The evidence.
        threshold: What it exceeded.
    """

    score: Score
    threshold: float


@dataclass(frozen=True)
class Verdict:
    """What lint says of a model.

    Args:
        findings: Scores above their thresholds, the most certain first.
        scores: The largest score of every statistic that was computed.
        skipped: Checks that were not run, and why.
        notes: What the client should know although it is no sign of tampering.
    """

    findings: tuple[Finding, ...]
    scores: Mapping[str, Score]
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def alarm(self) -> bool:
        """Whether the model should not be trained on."""
        return bool(self.findings)

    @property
    def checks(self) -> tuple[str, ...]:
        """The checks that raised the alarm, in their order."""
        found = {finding.score.check for finding in self.findings}
        return tuple(sorted(found, key=lambda check: int(check[1:])))

    def lines(self) -> tuple[str, ...]:
        """One sentence for each place: the evidence, then the mechanism that it speaks for."""
        places: dict[str, list[Finding]] = {}
        for finding in self.findings:
            places.setdefault(finding.score.place, []).append(finding)
        return tuple(_sentence(place, found, self.checks) for place, found in places.items())

    def __str__(self) -> str:
        if not self.alarm:
            return f"No sign of tampering in {len(self.scores)} statistics."
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "schema": "leakatlas/lint/1",
            "alarm": self.alarm,
            "checks": list(self.checks),
            "evidence": list(self.lines()),
            "findings": [
                {
                    "check": finding.score.check,
                    "statistic": finding.score.statistic,
                    "place": finding.score.place,
                    "value": finding.score.value,
                    "threshold": finding.threshold,
                    "words": finding.score.words,
                }
                for finding in self.findings
            ],
            "scores": {
                name: {"value": score.value, "place": score.place, "words": score.words}
                for name, score in sorted(self.scores.items())
            },
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }


def judge(
    scores: list[Score],
    thresholds: Mapping[str, float],
    *,
    skipped: Mapping[str, str],
    notes: tuple[str, ...] = (),
) -> Verdict:
    """Compare scores with thresholds; one finding for each statistic and place.

    A score that is not finite is a finding whatever the threshold: its numbers were chosen out of
    range, as no training does.
    """
    findings, seen = [], []
    for score in scores:
        finite = math.isfinite(score.value)
        if not finite:
            words = f"a number beyond all range ({score.value}); {score.words}"
            score = replace(score, value=1.0, words=words)
        seen.append(score)
        if not finite or score.value > thresholds[score.statistic]:
            findings.append(Finding(score, thresholds[score.statistic]))
    findings.sort(key=lambda f: (-f.score.value, int(f.score.check[1:]), f.score.statistic))
    largest: dict[str, Score] = {}
    for score in seen:
        if score.statistic not in largest or score.value > largest[score.statistic].value:
            largest[score.statistic] = score
    return Verdict(tuple(findings), largest, dict(skipped), notes)


def _sentence(place: str, findings: list[Finding], everywhere: tuple[str, ...]) -> str:
    findings = sorted(findings, key=lambda f: int(f.score.check[1:]))
    words = ", ".join(dict.fromkeys(finding.score.words for finding in findings))
    here = {name for f in findings for name in (f.score.check, f.score.statistic)}
    named = ""
    for needed, mechanism in MECHANISMS:
        if needed <= here | (ELSEWHERE & set(everywhere)) and needed & here - ELSEWHERE:
            named = f": {mechanism}"
            break
    return f"{place or 'model'}: {words}{named}"
