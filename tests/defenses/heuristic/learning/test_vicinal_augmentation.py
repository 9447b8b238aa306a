from __future__ import annotations

import pytest
import torch

from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.learning.vicinal_augmentation import (
    VicinalAugmentation,
    mixtures,
)
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import first_layer_readout, ledger, observed, replayed


def batch(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


def test_the_mixture_is_the_formula() -> None:
    x = batch()
    for i in range(3):
        torch.testing.assert_close(mixtures(x, 0.8)[i], -0.8 * x[i] + (1 - 0.8) * x[(i + 1) % 3])


def test_a_batch_of_one_gives_a_scaled_copy() -> None:
    x = batch(1)
    torch.testing.assert_close(mixtures(x, 0.8), -0.6 * x)


def test_the_reverse_variant_is_the_exact_negative() -> None:
    x = batch()
    assert torch.equal(mixtures(x, 1.0), -x)


def test_rolling_the_batch_rolls_the_mixtures() -> None:
    x = batch()
    assert torch.equal(mixtures(x.roll(1, 0), 0.8), mixtures(x, 0.8).roll(1, 0))


def test_labels_of_the_first_parent_in_either_form() -> None:
    defense = VicinalAugmentation()
    y = torch.tensor([4, 1, 2])
    assert defense.simulate_batch(batch(), y)[1].tolist() == [4, 1, 2, 4, 1, 2]
    soft = torch.eye(5)[y]
    assert torch.equal(defense.simulate_batch(batch(), soft)[1], torch.cat([soft, soft]))


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 3), (0.3, 4), (0.5, 5), (1.0, 6)])
def test_a_fraction_of_the_batch_is_appended(fraction: float, expected: int) -> None:
    x, y = VicinalAugmentation(fraction=fraction).simulate_batch(batch(), torch.arange(3))
    assert len(x) == len(y) == expected
    assert torch.equal(x[:3], batch())


def test_the_gradient_is_the_mean_over_both_halves() -> None:
    view, x = observed(
        VicinalAugmentation(), settings={"width": 4, "norm": "group"}, examples=3, letter="B"
    )
    halves = [replayed(view, part) for part in (x, mixtures(x, 0.8))]
    for name, sent in view.update.tensors.items():
        torch.testing.assert_close(sent, (halves[0][name] + halves[1][name]) / 2)
    assert ledger(view.update.tensors, halves[0])[0] < 1 - 1e-3


def test_the_private_batch_itself_is_not_changed() -> None:
    stage = build_stage(examples=3, defenses=(VicinalAugmentation(),))
    before = stage.federation.clients[0].x.clone()
    record = stage.federation.play_round()
    assert torch.equal(stage.federation.clients[0].x, before)
    assert record.updates[0].num_examples == 3  # the weight in the average is that of real images


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize(
    "protocol", [FedSGD(), FedSGD(reduction="sum"), FedAVG(epochs=2, batch_size=2, lr=0.1)]
)
def test_the_true_batch_is_an_exact_zero_of_the_adaptive_objective(
    protocol: Protocol, fraction: float
) -> None:
    view, x = observed(VicinalAugmentation(fraction=fraction), protocol=protocol)
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, g)) > 0.05


def test_gradients_reach_the_candidate_through_the_mixture() -> None:
    view, x = observed(VicinalAugmentation())
    candidate = (0.5 * x).requires_grad_()
    value = matching.squared_l2(view.replay(candidate, view.labels), dict(view.update.tensors))
    (slope,) = torch.autograd.grad(value, candidate)
    assert float(slope.flatten(1).norm(dim=1).min()) > 0


def test_the_readout_returns_one_photo_up_to_scale() -> None:
    found, x = first_layer_readout(VicinalAugmentation(), act="tanh")
    cosine = float(torch.cosine_similarity(found, x, dim=0))
    assert abs(cosine) == pytest.approx(1, abs=1e-9)
    assert float((found - x).abs().max()) > 0.1


def test_a_unit_that_only_the_photo_excites_returns_it_exactly() -> None:
    found, x = first_layer_readout(VicinalAugmentation(), act="relu")
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("name", ["fraction", "mix"])
def test_shares_above_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidParameter, match=name):
        VicinalAugmentation(**{name: 1.1})
