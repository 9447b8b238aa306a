"""What studies look at in a trial, held against slow loops."""

from unittest.mock import Mock

import pytest
import torch

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.bench import examine, harness
from leakatlas.blocks import readout
from leakatlas.data import Box, patches
from leakatlas.errors import InvalidInput
from leakatlas.fl import ModelRef, Scenario, stage


def test_alone_is_counted_like_a_loop_and_the_top_bin_is_unbounded() -> None:
    edges = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    h = torch.tensor([0.5, 0.6, 1.5, 2.5, 9.0, -1.0], dtype=torch.float64)

    def bin_of(value: float) -> int:
        return sum(value > float(edge) for edge in edges[:-1])

    bins = [bin_of(float(value)) for value in h]
    expected = [bins.count(b) == 1 for b in bins]
    assert examine.alone(h, edges).tolist() == expected
    assert expected == [False, False, True, False, False, True]


def test_errors_and_exact_follow_the_bins_of_a_real_round() -> None:
    """Exactly the images alone in a bin come back; one without a candidate has no error at all."""
    reference = ModelRef("builtin", "convnet", {"size": 8, "width": 4, "classes": 10})
    images = patches(8, 24, part="victim")
    scene = stage(
        Scenario(model=reference, letter="G"),
        model=reference.build().double(),
        victims=images,
        surrogate=patches(8, 64, part="surrogate"),
        box=Box.unit(3),
    )
    trial = harness.run_trial(scene, RobbingTheFed(bins=32))
    key = trial.view.key
    single = examine.alone(trial.truth.images.double().flatten(1) @ key["w"], key["edges"])
    exact = examine.exact(trial)
    assert 0 < int(single.sum()) < len(single)
    assert bool(exact[single].all())
    assert int(exact.sum()) == int(single.sum())
    error = examine.errors(trial)
    assert int(torch.isinf(error).sum()) == max(0, len(error) - len(trial.images))


def test_bins_of_a_sum_are_those_of_each_client() -> None:
    """Two clients with the same brightness do not disturb each other."""
    edges = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    images = torch.tensor([0.2, 0.7, 0.2, 0.7], dtype=torch.float64).reshape(4, 1, 1, 1)

    trial = Mock()
    trial.view.key = {"edges": edges}
    trial.truth.images = images
    trial.images = images[:0]
    found = examine.bins(trial, 2)
    assert found["alone"] == [1.0] * 4 and found["exact_of_alone"] == [0.0] * 4
    assert found["expected_alone"] == readout.expected_singletons(2, 2) / 2
    assert examine.bins(trial, 4)["alone"] == [0.0] * 4
    trial.view.key = {}
    with pytest.raises(InvalidInput, match="no bins"):
        examine.bins(trial, 2)
