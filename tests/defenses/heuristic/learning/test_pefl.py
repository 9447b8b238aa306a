from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.defenses.heuristic.learning import pefl
from leakatlas.defenses.heuristic.learning.pefl import PEFL, Cascade, balanced
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, model_state
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, replayed

HIDDEN = PEFL(private_factor="input")
FC: dict[str, Any] = {"widths": (24, 16)}


def _network(name: str, **settings: Any) -> nn.Module:
    return models.build(name, size=8, **settings).double().eval()


@pytest.mark.parametrize("factors", [2, 3, 4])
@pytest.mark.parametrize("name", ["convnet", "lenet", "fc", "vit", "resnet18"])
def test_factorised_layers_compute_what_they_did(name: str, factors: int) -> None:
    model = _network(name)
    defended = PEFL(factors=factors).model(model)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(defended(x), model(x), rtol=1e-6, atol=1e-6)
    assert not pefl.factorisable(defended) == pefl.factorisable(model)


def test_strides_paddings_and_dilations_are_kept() -> None:
    for layer in (
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.Conv2d(3, 5, (3, 1), dilation=2, bias=False),
        nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    ):
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(pefl.cascade(layer, 3, 1.0)(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("inner", [4, 6, 9])
def test_factors_are_balanced_and_their_product_is_the_matrix(factors: int, inner: int) -> None:
    W = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = balanced(W, factors, inner)
    product = torch.linalg.multi_dot(parts) if factors > 2 else parts[0] @ parts[1]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = min(inner, 6)
    torch.testing.assert_close(product, U[:, :kept] * S[:kept] @ Vh[:kept])
    for part in parts:
        torch.testing.assert_close(torch.linalg.svdvals(part)[:kept], S[:kept].pow(1 / factors))


def test_the_gradients_of_factors_are_the_identities() -> None:
    """``dL/dW_i = (W_1 .. W_{i-1})^T G (W_{i+1} .. W_m)^T``, against autograd on W itself."""
    layer = nn.Linear(7, 5).double()
    x, target = torch.randn(4, 7).double(), torch.randn(4, 5).double()
    (G,) = torch.autograd.grad((layer(x) - target).square().sum(), layer.weight)
    made = pefl.cascade(layer, 3, 1.0)
    weights = list(made.parameters())[:3]
    found = torch.autograd.grad((made(x) - target).square().sum(), weights)
    third, second, first = (weight.detach() for weight in weights)
    torch.testing.assert_close(found[2], G @ (second @ third).T)
    torch.testing.assert_close(found[1], first.T @ G @ third.T)
    torch.testing.assert_close(found[0], (first @ second).T @ G)


@pytest.mark.parametrize("factors", [2, 3, 4])
def test_one_image_comes_out_of_a_first_layer_exactly(factors: int) -> None:
    """Negative: with all factors shared nothing is protected where it matters first."""
    stage = build_stage(model="fc", settings=FC, examples=1, defenses=(PEFL(factors=factors),))
    record = stage.federation.play_round()
    made = record.received[0].get_submodule("hidden.1")
    assert isinstance(made, Cascade)
    weights = [p.detach() for n, p in made.named_parameters() if n.endswith("weight")][:0:-1]
    found = pefl.input_of(record.updates[0].tensors, "hidden.1", weights)
    x = stage.federation.clients[0].x.flatten()
    assert relative_error({"x": found}, {"x": x}) < 1e-9


def test_the_row_space_of_the_inner_factor_spans_several_images() -> None:
    stage = build_stage(model="fc", settings=FC, examples=4, defenses=(PEFL(),))
    g = stage.federation.play_round().updates[0].tensors["hidden.1.0.weight"]
    x = stage.federation.clients[0].x.flatten(1)
    _, S, Vh = torch.linalg.svd(g, full_matrices=False)
    basis = Vh[S > 1e-9 * S[0]]
    assert len(basis) == 4
    torch.testing.assert_close(x @ basis.T @ basis, x)


@pytest.mark.parametrize("defense", [PEFL(), PEFL(factors=3, width=0.5)])
def test_with_all_factors_shared_the_true_batch_is_an_exact_zero(defense: PEFL) -> None:
    view, x = observed(defense)
    assert relative_error(replayed(view, x), dict(view.update.tensors)) < 1e-9


def test_private_factors_stay_on_clients_and_differ() -> None:
    stage = build_stage(
        model="convnet", settings={"width": 4}, examples=3, clients=2, defenses=(HIDDEN,),
        protocol=FedAVG(lr=0.1, batch_size=3),
    )  # fmt: skip
    federation = stage.federation
    record = federation.play_round(apply=True)
    assert federation.private_names
    assert all(name.endswith(".0.weight") for name in federation.private_names)
    for update in record.updates.values():
        assert not federation.private_names & set(update.tensors)
    ours, theirs = (federation.clients[i].private for i in (0, 1))
    name = sorted(federation.private_names)[0]
    assert not torch.equal(ours[name], theirs[name])
    assert not torch.equal(ours[name], model_state(federation.model)[name])


def test_a_private_factor_hides_the_replay_from_who_guesses_it() -> None:
    view, x = observed(HIDDEN)
    assert relative_error(replayed(view, x), dict(view.update.tensors)) > 0.1


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="another defense"):
        PEFL().model(nn.Sequential(nn.Flatten(), nn.ReLU()))
