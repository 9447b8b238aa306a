from __future__ import annotations

import pytest
import torch

from leakatlas.blocks import matching
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping, estimated_bound, norm
from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, Protocol
from tests.conftest import relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    an_update,
    ledger,
    observed,
    random_tensors,
    readout_error,
    replayed,
)

BOUND = 0.5


def test_the_norm_is_that_of_all_entries_together() -> None:
    tensors = random_tensors()
    flat = torch.cat([t.flatten() for t in tensors.values()])
    torch.testing.assert_close(norm(tensors), flat.square().sum().sqrt())


def test_the_norm_is_bounded_and_the_direction_kept() -> None:
    tensors = random_tensors()
    before = {name: t.clone() for name, t in tensors.items()}
    sent = Clipping(max_norm=BOUND).update(an_update(tensors), a_context()).tensors
    cosine, size = ledger(sent, tensors)
    assert cosine == pytest.approx(1, abs=1e-12)
    assert size == pytest.approx(BOUND / (float(norm(tensors)) + 1e-6))
    assert float(norm(sent)) <= BOUND
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_it_is_torchs_own_clipping() -> None:
    tensors = random_tensors()
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors.values()]
    for parameter, t in zip(parameters, tensors.values(), strict=True):
        parameter.grad = t.clone()
    torch.nn.utils.clip_grad_norm_(parameters, BOUND)
    sent = Clipping(max_norm=BOUND).update(an_update(tensors), a_context()).tensors
    for parameter, t in zip(parameters, sent.values(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(t, parameter.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_layer", [False, True])
def test_clipping_twice_is_clipping_once(per_layer: bool) -> None:
    defense = Clipping(max_norm=BOUND, per_layer=per_layer)
    once = defense.update(an_update(random_tensors()), a_context())
    twice = defense.update(once, a_context())
    for name, t in once.tensors.items():
        torch.testing.assert_close(twice.tensors[name], t, rtol=5e-6, atol=0)


def test_an_update_within_the_bound_is_sent_bitwise() -> None:
    tensors = random_tensors()
    for bound in (float(norm(tensors)) + 1.0, float("inf")):
        sent = Clipping(max_norm=bound).update(an_update(tensors), a_context()).tensors
        assert all(torch.equal(sent[name], t) for name, t in tensors.items())


def test_per_layer_bounds_every_tensor_and_keeps_its_direction() -> None:
    tensors = random_tensors()
    sent = Clipping(max_norm=BOUND, per_layer=True).update(an_update(tensors), a_context()).tensors
    for name, t in tensors.items():
        assert float(sent[name].norm()) <= BOUND
        if t.any():
            assert ledger({name: sent[name]}, {name: t})[0] == pytest.approx(1, abs=1e-12)
    assert ledger(sent, tensors)[0] < 0.99  # across layers the direction does change


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.5)])
def test_the_true_batch_is_an_exact_zero_of_the_adaptive_objective(
    protocol: Protocol, per_layer: bool
) -> None:
    view, x = observed(Clipping(max_norm=0.1, per_layer=per_layer), protocol=protocol)
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) < 1e-9
    oblivious = replayed(view, x, adaptive=False)
    assert float(matching.relative_l2(oblivious, g)) > 0.1
    if not per_layer:
        assert float(matching.cosine(oblivious, g)) == pytest.approx(0, abs=1e-12)


def test_the_bound_is_what_an_observer_sees() -> None:
    view, _ = observed(Clipping(max_norm=0.1), letter="A")
    assert estimated_bound(view.update) == pytest.approx(0.1, rel=1e-5)


def test_the_readout_does_not_notice() -> None:
    assert readout_error(Clipping(max_norm=1e-3)) < 1e-9
    assert readout_error(Clipping(max_norm=1e-3, per_layer=True)) > 0.01  # two tensors, two factors


def test_the_readout_of_per_layer_clipping_is_right_up_to_scale() -> None:
    from tests.defenses.heuristic.probes import first_layer_readout

    found, x = first_layer_readout(Clipping(max_norm=1e-3, per_layer=True))
    assert float(torch.cosine_similarity(found, x, dim=0)) == pytest.approx(1, abs=1e-9)


def test_a_bound_of_zero_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameter, match="max_norm"):
        Clipping(max_norm=0.0)


def test_differentiating_a_zero_update_stays_finite() -> None:
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sent = Clipping(max_norm=1.0).simulate({"w": x * 1.0}, x, x, an_update({"w": x}))
    (slope,) = torch.autograd.grad(sent["w"].sum(), x)
    assert torch.isfinite(slope).all()
