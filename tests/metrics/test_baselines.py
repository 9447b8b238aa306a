"""Null baselines."""

from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidInput
from leakatlas.metrics import mean_image, mse, nearest_public, random_same_class


def photos(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


PUBLIC, X = photos(20, 0), photos(5, 1)


def test_mean_image_is_the_best_constant_guess() -> None:
    mean = mean_image(PUBLIC)
    assert torch.equal(mean, PUBLIC.double().mean(dim=0))
    best = mse(mean.expand(20, -1, -1, -1), PUBLIC).mean()
    assert best < mse((0.9 * mean + 0.05).expand(20, -1, -1, -1), PUBLIC).mean()


def test_nearest_public_agrees_with_a_plain_search() -> None:
    found = nearest_public(X, PUBLIC)
    for i in range(len(X)):
        errors = torch.stack([(p.double() - X[i].double()).square().mean() for p in PUBLIC])
        assert torch.equal(found[i], PUBLIC[errors.argmin()].double())


def test_same_class_draws_from_the_class_and_falls_back_to_the_mean() -> None:
    public_labels = torch.arange(20) % 4
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([2, 0, 9])
    drawn = random_same_class(labels, PUBLIC, public_labels, generator=generator)
    for i, label in enumerate([2, 0]):
        members = PUBLIC[public_labels == label].double()
        assert any(torch.equal(drawn[i], member) for member in members)
    assert torch.equal(drawn[2], mean_image(PUBLIC))


def test_same_class_is_reproducible_and_varies() -> None:
    public_labels, labels = torch.zeros(20, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    draws = [
        random_same_class(
            labels, PUBLIC, public_labels, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidInput, match="at least one public image"):
        mean_image(PUBLIC[:0])
    with pytest.raises(InvalidInput, match="like the originals"):
        nearest_public(X, PUBLIC[:, :1])
    with pytest.raises(InvalidInput, match="expected 20 public labels"):
        random_same_class(
            torch.tensor([0]), PUBLIC, torch.zeros(3), generator=torch.Generator().manual_seed(0)
        )
