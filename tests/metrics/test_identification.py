"""Retrieval in a stated gallery."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import feature_mse, iip

GALLERY = torch.eye(5)


def test_iip_by_hand() -> None:
    guesses = torch.tensor([[9.0, 1, 0, 0, 0], [1.0, 0.5, 0, 0, 0], [0, 0, 0, 0, 2.0]])
    found = iip(guesses, GALLERY, torch.tensor([0, 1, 4]))  # the second is nearer to entry 0
    assert (found.hits, found.gallery, found.chance) == (2, 5, 0.2)
    assert found.value == pytest.approx(2 / 3)
    assert found.interval.low < found.value < found.interval.high


def test_failures_and_empty_features_retrieve_nothing() -> None:
    index = torch.tensor([0, 0, 0])
    guesses = torch.tensor([[0.0] * 5, [torch.nan] * 5, [1.0, 0, 0, 0, 0]])
    assert iip(guesses, GALLERY, index).hits == 1
    none = torch.zeros(3, dtype=torch.bool)
    assert iip(guesses, GALLERY, index, found=none).hits == 0


def test_feature_mse_by_hand() -> None:
    assert feature_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]])).item() == 5


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidInput, match="a gallery"):
        iip(torch.ones(2, 3), GALLERY, torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match="gallery of 5"):
        iip(GALLERY[:1], GALLERY, torch.tensor([7]))
    with pytest.raises(InvalidInput, match="at least one"):
        iip(GALLERY[:0], GALLERY, torch.tensor([], dtype=torch.long))
    with pytest.raises(InvalidInput, match=r"two \(B, D\)"):
        feature_mse(torch.ones(2, 3), torch.ones(2, 4))
