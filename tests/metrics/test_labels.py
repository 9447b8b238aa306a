"""Label measures, with the baselines that make them readable."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import counts_of, exact_batch, irec, label_scores, le_acc, ln_acc

TRUE = torch.tensor([2, 1, 0, 1])


def test_irec_by_hand() -> None:
    guess = torch.tensor([1, 1, 2, 0])  # overlap 1 + 1 + 0 + 0 of 4
    assert irec(guess, TRUE) == 0.5
    assert irec(guess, TRUE) == 1 - 0.5 * float((guess - TRUE).abs().sum()) / 4


def test_existence_and_count_accuracy_by_hand() -> None:
    guess = torch.tensor([1, 1, 2, 0])
    assert le_acc(guess, TRUE) == 0.5  # classes 0 and 1
    assert ln_acc(guess, TRUE) == 0.25  # class 1 alone


def test_exact_batch() -> None:
    assert exact_batch(TRUE.clone(), TRUE)
    assert not exact_batch(TRUE.flip(0), TRUE)


def test_predicting_nothing_looks_good_on_le_acc() -> None:
    true = torch.zeros(1_000, dtype=torch.long)
    true[:24] = 1
    found = label_scores(torch.zeros_like(true), true)
    assert found.le_acc == found.empty_le_acc == pytest.approx(0.976)
    assert found.irec == 0 and not found.exact_batch


def test_counts_of_labels() -> None:
    assert counts_of(torch.tensor([0, 3, 0, 1]), 4).tolist() == [2, 1, 0, 1]
    assert counts_of(torch.zeros(0, dtype=torch.long), 3).tolist() == [0, 0, 0]


def test_one_class_is_always_right() -> None:
    assert label_scores(torch.tensor([5]), torch.tensor([5])).irec == 1


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"lie in 0\.\.2"):
        counts_of(torch.tensor([3]), 3)
    with pytest.raises(InvalidInput, match="must be integers"):
        counts_of(torch.tensor([0.5]), 3)
    with pytest.raises(InvalidInput, match="one length"):
        irec(TRUE, TRUE[:2])
    with pytest.raises(InvalidInput, match="non-negative"):
        le_acc(-TRUE, TRUE)
    with pytest.raises(InvalidInput, match="batch is empty"):
        ln_acc(TRUE, torch.zeros_like(TRUE))
