"""What lint says of a population of models: thresholds from honest ones, alarms on any.

Models are judged one by one (:func:`judge`); a run of several checkpoints is one group, so that an
alarm on it counts once where independence matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leakatlas.lint import holdings, thresholds
from leakatlas.lint.examine import measure


@dataclass(frozen=True)
class Judged:
    """Largest value of every statistic on one model.

    Args:
        group: Models of one run have one.
        architecture: Its name.
        scores: By statistic, in [0, 1].
    """

    group: str
    architecture: str
    scores: Mapping[str, float]


def judge(group: str, architecture: str, model: nn.Module, **held: Any) -> Judged:
    """A model judged with what its client holds; see :func:`leakatlas.lint.measure`."""
    scores: dict[str, float] = {}
    for score in measure(model, **held)[0]:
        scores[score.statistic] = max(score.value, scores.get(score.statistic, 0.0))
    return Judged(group, architecture, scores)


def calibrated(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of every statistic: median, and the largest values of the two largest groups."""
    found: dict[str, Any] = {"models": len(judged)}
    for statistic in holdings.CALIBRATED:
        groups: dict[str, float] = {}
        values = [j.scores[statistic] for j in judged if statistic in j.scores]
        for j in judged:
            groups[j.group] = max(j.scores.get(statistic, 0.0), groups.get(j.group, 0.0))
        first, second = sorted(groups.values())[:-3:-1]
        found[f"largest/{statistic}"], found[f"second/{statistic}"] = first, second
        found[f"median/{statistic}"] = float(torch.tensor(values or [0.0]).median())
    return found


def rates(judged: Sequence[Judged], *, everywhere: bool) -> dict[str, Any]:
    """One 0 or 1 for every model, by what is held, by check, by detector and by level.

    Args:
        judged: Models of one case and seed.
        everywhere: Whether a check that cannot run counts as silent, or not at all.
    """
    shipped = thresholds.shipped().thresholds

    def alarm(one: Judged, held: frozenset[str], level: float = 0.5) -> float:
        # Half-way to certainty is the threshold in use; other levels move all thresholds alike.
        return float(any(v > 1 - (1 - shipped[n]) * 2 * (1 - level)
                         for n, v in one.scores.items() if n in held))  # fmt: skip

    def runs(held: frozenset[str]) -> list[Judged]:
        return [j for j in judged if held & j.scores.keys()]

    found: dict[str, Any] = {}
    for name, held in holdings.HOLDINGS.items():
        found[name] = [alarm(j, held) for j in judged]
        groups: dict[str, float] = {}
        for j in judged:
            groups[j.group] = max(alarm(j, held), groups.get(j.group, 0.0))
        found[f"{name}, independent"] = list(groups.values())
    for name, level in holdings.LEVELS:
        found[f"{name}, level {level}"] = [alarm(j, holdings.HOLDINGS[name], level) for j in judged]
    for check in holdings.CHECKS:
        own = holdings.of(check)
        found[check] = [alarm(j, own) for j in (judged if everywhere else runs(own))]
    for name, own in holdings.DETECTORS.items():
        found[name] = [alarm(j, own) for j in runs(own)]
    found["thresholds"] = thresholds.fingerprint(shipped)
    return found
