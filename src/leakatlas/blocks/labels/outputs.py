"""What a label rule can know: counts, a multiset, a set, an order, or soft labels.

The types are not interchangeable, and the weaker ones are not silently completed. An attack that
needs B hard labels asks :func:`as_multiset`, which counts what had to be made up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.blocks.labels.counts import labels_from_counts, round_counts
from leakatlas.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often each class occurs.

    Args:
        values: ``(K,)`` int64.
        raw: The estimate before rounding, ``(K,)`` float64; None for rules that count in units.
        settled: Whether the estimate came to rest; if not, it is where the iterations ended.
    """

    values: Tensor
    raw: Tensor | None = None
    settled: bool = True


@dataclass(frozen=True, kw_only=True)
class Multiset:
    """B labels in no order.

    Args:
        labels: ``(B,)`` int64, ascending.
        classes: K.
        padded: How many of them no rule supports; 0 unless a weaker output was completed.
    """

    labels: Tensor
    classes: int
    padded: int = 0


@dataclass(frozen=True, kw_only=True)
class LabelSet:
    """Which classes occur, ``present`` ``(K,)`` boolean; repeats are not counted."""

    present: Tensor


@dataclass(frozen=True, kw_only=True)
class Order:
    """One hard label a sample, ``labels`` ``(B,)`` int64, in the order of the samples."""

    labels: Tensor
    classes: int


@dataclass(frozen=True, kw_only=True)
class Soft:
    """One distribution over classes a sample, ``probabilities`` ``(B, K)``."""

    probabilities: Tensor


Recovered = Counts | Multiset | LabelSet | Order | Soft


def as_counts(found: Recovered) -> Tensor:
    """Class counts ``(K,)`` int64 of any output; a set counts each present class once."""
    match found:
        case Counts(values=values):
            return values.long()
        case Multiset(labels=labels, classes=classes) | Order(labels=labels, classes=classes):
            return torch.bincount(labels.long(), minlength=classes)
        case LabelSet(present=present):
            return present.long()
        case Soft(probabilities=probabilities):
            winners = probabilities.argmax(dim=1)
            return torch.bincount(winners, minlength=probabilities.shape[1])


def as_multiset(found: Recovered, batch_size: int) -> Multiset:
    """B hard labels of any output.

    A set smaller than the batch is completed by repeating its own classes evenly, never by random
    ones; a set larger than the batch loses its highest classes. ``padded`` says how many labels
    were added, so that a result cannot pass as fully recovered.

    Raises:
        InvalidInput: If no class was found at all.
    """
    counts = as_counts(found)
    supported = int(counts.sum())
    if supported == 0:
        raise InvalidInput(
            f"as_multiset: the rule found no class at all, so {batch_size} labels cannot be "
            "named; use a counting rule or optimise the labels jointly (joint_logits)."
        )
    if supported < batch_size:
        present = counts > 0
        share = present.double() * (batch_size - supported) / int(present.sum())
        extra = round_counts(share, batch_size - supported) * present
        return Multiset(
            labels=labels_from_counts(counts + extra),
            classes=len(counts),
            padded=batch_size - supported,
        )
    return Multiset(labels=labels_from_counts(counts)[:batch_size], classes=len(counts))
