from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import fl_gradinv
from leakatlas.attacks.optimization.basic.fl_gradinv import FLGradInv
from leakatlas.bench import harness
from leakatlas.blocks import buffers, matching
from leakatlas.blocks.buffers import Solved
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.fl import FedAVG, FedSGD, Protocol, Stage, View, batchnorm_statistics
from leakatlas.metrics.images import rdlv, ssim
from leakatlas.models import build
from leakatlas.threat import Grant, Knowledge, Vantage
from tests.attacks.case import Case
from tests.conftest import build_stage, photos, surrogate

ONE_STEP = FedAVG(epochs=1, batch_size=2, lr=0.05)
SCENE = {"model": "convnet-bn", "settings": {"width": 4}, "protocol": ONE_STEP}
CASE = Case({"steps": 3}, SCENE)
SHORT = FLGradInv(steps=3)


def small(**changes: Any) -> Stage:
    settings = {**SCENE, "examples": 2, "letter": "E", "public": surrogate(), **changes}
    return build_stage(**settings)


def seen(**changes: Any) -> tuple[View, Tensor, Tensor]:
    stage = small(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    return view, client.x, client.y


def solve(view: View) -> Solved:
    return fl_gradinv.statistics(view)


# -- statistics from buffers -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_statistics_of_a_client_of_one_step_come_back(dtype: torch.dtype) -> None:
    view, x, _ = seen(dtype=dtype)
    state = {**dict(view.model.named_parameters()), **dict(view.model.named_buffers())}
    truth = batchnorm_statistics(view.model.train(), state, x)
    solved = solve(view)
    assert solved.steps == 1
    for name, (mean, variance) in truth.items():
        torch.testing.assert_close(solved.statistics[name][0], mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(solved.statistics[name][1], variance, atol=1e-4, rtol=0)


def test_the_weighted_mean_over_k_steps_is_exact() -> None:
    """Against a loop of the layer's own rule; the one-step formula is far off."""
    layer = torch.nn.BatchNorm1d(1).double()
    model = torch.nn.Sequential(layer)
    before = {f"0.{n}": b.clone() for n, b in layer.named_buffers()}
    values = 0.15 + 0.01 * torch.randn(5, 6, 1, generator=torch.Generator().manual_seed(0)).double()
    for batch in values:
        layer(batch)
    after = {f"0.{n}": b.clone() for n, b in layer.named_buffers()}
    update = seen()[0].update
    sent = replace(update, buffers_before=before, buffers_after=after)
    solved = buffers.client_statistics(sent, model, (1,), 6, 1)
    assert solved.steps == 5
    weights = torch.tensor([0.9 ** (4 - j) for j in range(5)], dtype=torch.float64)
    weights /= weights.sum()
    mean, variance = solved.statistics["0"]
    expected = weights @ values.mean(1)[:, 0], weights @ values.var(1, correction=0)[:, 0]
    assert float(mean) == pytest.approx(float(expected[0]), abs=1e-14)
    assert float(variance) == pytest.approx(float(expected[1]), abs=1e-14)
    one_step = (after["0.running_mean"] - 0.9 * before["0.running_mean"]) / 0.1
    assert abs(float(one_step) - float(expected[0])) > 0.3
    assert buffers.step_weights(solved, 5) == pytest.approx(weights.tolist())


@pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(1, 2, 2), (3, 2, 6), (2, 4, 2)])
def test_the_counter_tells_the_local_steps(epochs: int, batch_size: int, steps: int) -> None:
    protocol = FedAVG(epochs=epochs, batch_size=batch_size, lr=0.01)
    view, _, _ = seen(protocol=protocol, examples=4)
    assert solve(view).steps == steps == protocol.steps(4)
    assert sum(buffers.step_weights(solve(view), 4 // batch_size)) == pytest.approx(1)


def test_the_truth_has_the_solved_statistics_at_the_received_weights() -> None:
    view, x, _ = seen()
    penalty = SHORT.bn_prior(view, solve(view))
    assert float(penalty(x)) < 1e-5
    assert float(penalty(x + 0.1)) > 1e-2


def test_after_several_steps_the_truth_has_them_nearly_and_noise_has_not() -> None:
    view, x, _ = seen(protocol=FedAVG(epochs=1, batch_size=2, lr=1e-3), examples=4)
    penalty = SHORT.bn_prior(view, solve(view))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert float(penalty(x)) < 0.05 * float(penalty(noise))
    swapped = penalty(x[[2, 3, 0, 1]])  # the weights of a later batch are larger
    assert float(penalty(x)) < float(swapped)


@pytest.mark.parametrize(
    "protocol", [FedSGD(mode="train"), FedAVG(epochs=2, batch_size=2, lr=1e-6)]
)
@pytest.mark.parametrize("vantage", [Vantage.AGGREGATE, Vantage.PEER])
def test_a_secure_sum_gives_the_clients_mean_statistics_without_their_counters(
    protocol: Protocol, vantage: Vantage
) -> None:
    stage = small(
        protocol=protocol, examples=2, clients=3, vantage=vantage,
        defenses=(SecureAggregation(ring_bits=64),),
    )  # fmt: skip
    view, _ = harness.observe(stage, SHORT)
    assert view.num_examples == 6
    solved = solve(view)
    assert solved.steps == protocol.steps(2)
    x = torch.cat([client.x for client in stage.federation.clients.values()])
    assert float(SHORT.bn_prior(view, solved)(x)) < 1e-4
    assert float(SHORT.bn_prior(view, solved)(x.roll(1, 0))) > 1e-3  # others' batches
    assert SHORT(view).status == "complete"


def test_a_client_without_moving_buffers_is_hopeless() -> None:
    still, _, _ = seen(protocol=FedAVG(batch_size=2, mode="eval"))
    assert SHORT.outlook(still).verdict == "hopeless"
    found = SHORT(still)
    assert found.status == "failed" and "did not move" in found.reason
    private, _, _ = seen(protocol=FedAVG(batch_size=2, shared=("*weight", "*bias")))
    found = SHORT(private)
    assert found.status == "failed" and "keeps the buffers" in found.reason
    plain, _, _ = seen(model="convnet")
    assert SHORT.outlook(plain).verdict == "hopeless"
    assert SHORT.outlook(seen()[0]).verdict == "applicable"


# -- the search ------------------------------------------------------------------------------------


def test_the_matching_term_moves_the_images() -> None:
    """The released code's simulated update is detached, and does not."""
    view, x, y = seen()
    moved = (x + 0.3).requires_grad_()
    distance = matching.layerwise_l2(view.replay(moved, y), dict(view.update.tensors))
    (slope,) = torch.autograd.grad(distance, moved)
    assert float(slope.abs().max()) > 1e-6
    there = matching.layerwise_l2(view.replay(x, y), dict(view.update.tensors))
    assert float(there.detach()) < 1e-6


def test_the_model_is_as_it_was() -> None:
    view, _, _ = seen()
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    SHORT(view)
    assert all(torch.equal(before[n], t) for n, t in view.model.state_dict().items())


def test_options_change_what_must_be_known() -> None:
    assert SHORT.knowledge() == Knowledge.UPDATES | Knowledge.TRAINING | Knowledge.DISTRIBUTION
    noise = replace(SHORT, start="noise")
    assert noise.knowledge() == Knowledge.UPDATES | Knowledge.TRAINING
    view, _, _ = seen(letter="C")
    assert noise(view).status == "complete"
    assert Knowledge.DISTRIBUTION in SHORT.missing(view)
    for variant in FLGradInv.variants().values():
        assert variant.knowledge() & ~FLGradInv.needs == Knowledge(0)


def test_it_starts_from_the_mean_of_the_population() -> None:
    view, _, _ = seen()
    like = next(iter(view.update.tensors.values()))
    generator = torch.Generator().manual_seed(0)
    start = SHORT.first(view, generator, like)
    torch.testing.assert_close(start, view.distribution.mean.expand(2, -1, -1, -1))
    grey = replace(SHORT, grey=True)
    assert grey.first(view, generator, like).shape == (2, 1, 8, 8)
    images = grey(view).images
    assert torch.equal(images[:, 0], images[:, 1]) and images.shape == (2, 3, 8, 8)


def test_without_the_statistics_they_stay_further_away() -> None:
    """Ablation, with granted labels."""
    view, _, _ = seen(grants=frozenset({Grant.LABELS}))
    attack = replace(FLGradInv.tuned(), steps=60, bn_weight=1.0)
    found = attack(view)
    without = replace(attack, bn_weight=0.0)(view)
    assert found.notes["bn_distance"] < 0.5 * without.notes["bn_distance"]
    assert view.box.contains(found.images)


def test_a_single_gradient_with_buffers_will_do() -> None:
    view, _, _ = seen(protocol=FedSGD(mode="train"))
    assert solve(view).steps == 1
    assert SHORT(view).status == "complete"


def test_the_modes_differ_and_the_weights_at_which_statistics_are_taken() -> None:
    view, _, _ = seen()
    published, released = SHORT(view), replace(SHORT, match="bn")(view)
    assert not torch.equal(published.images, released.images)
    assert released.notes["bn_distance"] > 0
    x = seen()[1]
    late = replace(SHORT, statistics_at="updated").bn_prior(view, solve(view))
    assert float(late(x)) > 1e-4 > float(SHORT.bn_prior(view, solve(view))(x))


# -- what a client can check itself ----------------------------------------------------------------


def test_relative_leakage_is_zero_for_the_prior_and_largest_for_the_truth() -> None:
    originals = photos(2, 16).images.double()
    prior = 0.5 * originals.mean(0) + 0.25
    nothing = rdlv(prior.expand(2, -1, -1, -1), originals, prior)
    torch.testing.assert_close(nothing, torch.zeros(2).double())
    base = ssim(prior.expand(2, -1, -1, -1), originals)
    torch.testing.assert_close(rdlv(originals, originals, prior), (1 - base) / base)
    assert bool(rdlv(originals, originals, 1 - originals[0]).isnan().any())


def test_a_model_with_layers_of_its_own_kind() -> None:
    model = build("convnet-bn", size=8, width=4)
    seen_values = buffers.values_per_example(model, (3, 8, 8))
    assert set(seen_values.values()) <= {64, 16, 4}
    assert len(seen_values) > 1
