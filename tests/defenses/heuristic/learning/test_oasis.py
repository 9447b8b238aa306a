from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.analytic.sparsification.robbing_the_fed import RobbingTheFed
from leakatlas.bench import harness
from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.learning.oasis import (
    OASIS,
    TRANSFORMS,
    Copies,
    flipped,
    sheared,
    turned,
)
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.metrics.assignment import pairwise_mse
from tests.conftest import build_stage, photos, relative_error, surrogate
from tests.defenses.heuristic.probes import observed, replayed

SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
KINDS: tuple[Copies, ...] = ("rotation", "shear", "flip", "rotation and shear")


def batch(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def test_turns_and_flips_by_hand() -> None:
    assert turned(1)(SQUARE)[0, 0].tolist() == [[2, 4], [1, 3]]
    assert turned(2)(SQUARE)[0, 0].tolist() == [[4, 3], [2, 1]]
    assert flipped(-1)(SQUARE)[0, 0].tolist() == [[2, 1], [4, 3]]
    assert torch.equal(turned(1)(turned(3)(batch())), batch())


def test_a_shear_by_hand() -> None:
    """Three rows: the upper one moves to the left, the lower one to the right."""
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    assert sheared(1.0)(x)[0, 0].tolist() == [[2, 3, 0], [4, 5, 6], [0, 7, 8]]
    assert torch.equal(sheared(0.0)(x), x)


def test_turns_keep_what_an_imprint_of_the_brightness_measures() -> None:
    x = batch()
    for transform in (*TRANSFORMS["rotation"], *TRANSFORMS["flip"]):
        torch.testing.assert_close(transform(x).mean((1, 2, 3)), x.mean((1, 2, 3)))
    drift = (TRANSFORMS["shear"][2](x).mean((1, 2, 3)) - x.mean((1, 2, 3))).abs()
    assert float(drift.min()) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stand_behind_the_batch_under_their_labels(kind: Copies) -> None:
    x, y = batch(), torch.tensor([4, 1, 2])
    seen, labels = OASIS(copies=kind).simulate_batch(x, y)
    count = len(TRANSFORMS[kind])
    assert torch.equal(seen[:3], x) and len(seen) == 3 * (count + 1)
    assert labels.tolist() == [4, 1, 2] * (count + 1)
    soft = torch.eye(5)[y]
    assert torch.equal(OASIS(copies=kind).simulate_batch(x, soft)[1], soft.repeat(count + 1, 1))


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 3), (0.3, 6), (0.5, 9), (1.0, 12)])
def test_a_fraction_of_the_batch_gets_copies(fraction: float, expected: int) -> None:
    x, y = OASIS(fraction=fraction).simulate_batch(batch(), torch.arange(3))
    assert len(x) == len(y) == expected


def test_what_is_not_square_cannot_be_turned() -> None:
    oblong = torch.zeros(2, 3, 4, 6)
    with pytest.raises(InvalidInput, match="4x6; take copies='shear' or 'flip'"):
        OASIS().simulate_batch(oblong, torch.zeros(2))
    assert len(OASIS(copies="flip").simulate_batch(oblong, torch.zeros(2))[0]) == 6


def test_the_private_batch_and_its_weight_stay() -> None:
    stage = build_stage(examples=3, defenses=(OASIS(),))
    before = stage.federation.clients[0].x.clone()
    record = stage.federation.play_round()
    assert torch.equal(stage.federation.clients[0].x, before)
    assert record.updates[0].num_examples == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
def test_the_true_batch_is_an_exact_zero_of_the_adaptive_objective(
    protocol: Protocol, kind: Copies
) -> None:
    view, x = observed(OASIS(copies=kind), protocol=protocol)
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, g)) > 1e-3


def test_gradients_reach_the_candidate_through_every_copy() -> None:
    view, x = observed(OASIS(copies="rotation and shear"))
    candidate = (0.5 * x).requires_grad_()
    value = matching.squared_l2(view.replay(candidate, view.labels), dict(view.update.tensors))
    (slope,) = torch.autograd.grad(value, candidate)
    assert float(slope.flatten(1).norm(dim=1).min()) > 0


def nearest(direction: str, *defenses: OASIS, turns: bool = False) -> list[float]:
    """The squared error of the candidate nearest to each victim, in whatever quarter turn."""
    stage = build_stage(
        model="convnet", settings={"width": 4}, examples=2, letter="G", defenses=defenses,
        victims=photos(2), public=surrogate(),
    )  # fmt: skip
    attack = RobbingTheFed.from_json({"bins": 512, "direction": direction})
    trial = harness.run_trial(stage, attack)
    found = trial.images
    if turns:
        found = torch.cat([found, *(turned(q)(found) for q in (1, 2, 3))])
    return [float(value) for value in pairwise_mse(found, trial.truth.images).min(0).values]


def test_bins_of_brightness_hold_mixtures_and_those_of_a_random_direction_turned_images() -> None:
    """What the paper shows, and the weakness: turns keep the brightness and nothing else."""
    assert max(nearest("mean")) < 1e-9
    assert min(nearest("mean", OASIS(), turns=True)) > 1e-3
    assert min(nearest("random", OASIS(), turns=True)) < 1e-9


@pytest.mark.parametrize(("name", "value"), [("fraction", 1.1), ("copies", "mirror")])
def test_what_is_outside_the_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=name):
        OASIS(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
