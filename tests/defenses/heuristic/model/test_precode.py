from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from leakatlas import models
from leakatlas.defenses.heuristic.model.precode import (
    PRECODE,
    Bottleneck,
    divergence,
    log_softplus,
)
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, FedSGD, Protocol, model_state
from leakatlas.fl import replay as replays
from leakatlas.fl.state import load_into
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, readout_error, replayed

SMALL = PRECODE(latent=8)


def bottleneck_of(model: nn.Module) -> Bottleneck:
    (found,) = (m for m in model.modules() if isinstance(m, Bottleneck))
    return found


def test_the_bottleneck_stands_before_the_last_linear_layer_and_names_stay_readable() -> None:
    model = models.build("fc", size=8, widths=(12, 9))
    before = model_state(model)
    defended = SMALL.model(model)
    added = set(model_state(defended)) - set(before)
    assert added == {
        "fc.bottleneck.encoder.weight",
        "fc.bottleneck.encoder.bias",
        "fc.bottleneck.decoder.weight",
        "fc.bottleneck.decoder.bias",
        "fc.head.weight",
        "fc.head.bias",
    }
    held = model_state(defended)
    assert torch.equal(held["fc.head.weight"], before["fc.weight"])
    assert held["fc.bottleneck.encoder.weight"].shape == (16, 9)
    assert model_state(model).keys() == before.keys()  # the original is not changed


@pytest.mark.parametrize("name", ["lenet", "convnet", "convnet-bn", "vit", "resnet8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_every_architecture_keep_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    model = SMALL.model(models.build(name, size=8).to(dtype)).eval()
    logits = model(torch.zeros(2, 3, 8, 8, dtype=dtype))
    assert logits.shape == (2, 10)
    assert logits.dtype == dtype


@pytest.mark.parametrize("mode", [True, False])
def test_every_forward_pass_draws_anew_also_in_eval_mode(mode: bool) -> None:
    model = SMALL.model(models.build("lenet", size=8)).train(mode)
    x = torch.rand(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))


def test_two_rounds_on_the_same_batch_differ_and_the_same_seed_agrees() -> None:
    federations = [build_stage(model="lenet", defenses=(SMALL,)).federation for _ in range(2)]
    first, again = (f.play_round().updates[0].tensors for f in federations)
    second = federations[0].play_round().updates[0].tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["body.0.weight"], second["body.0.weight"])


def test_vanishing_noise_is_the_deterministic_bottleneck() -> None:
    model = PRECODE(latent=8, sigma_scale=1e-12).model(models.build("lenet", size=8).double())
    x = torch.rand(2, 3, 8, 8).double()
    held = bottleneck_of(model)

    class Noiseless(nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = held.decoder(held.encoder(h).chunk(2, dim=-1)[0])
            return out

    plain = copy.deepcopy(model)
    head = plain.get_submodule("fc.head")
    setattr(plain, "fc", nn.Sequential(Noiseless(), head))  # noqa: B010 - nn.Module typing
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


def test_the_divergence_is_that_of_torch_and_zero_only_at_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(4, 6, generator=generator).double()
    a = torch.randn(4, 6, generator=generator).double()
    sigma = nn.functional.softplus(a)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, sigma), torch.distributions.Normal(0.0, 1.0)
    ).sum(-1)
    torch.testing.assert_close(divergence(mu, a), expected)
    prior = torch.full((1, 6), math.log(math.e - 1)).double()  # softplus of it is 1
    assert float(divergence(torch.zeros(1, 6).double(), prior)) == pytest.approx(0, abs=1e-12)
    assert float(divergence(mu, a).min()) > 0


def test_the_log_of_sigma_does_not_underflow() -> None:
    a = torch.tensor([-200.0, -15.1, -14.9, 0.0, 50.0], requires_grad=True)
    values = log_softplus(a)
    expected = torch.nn.functional.softplus(a.detach().double()).log()
    torch.testing.assert_close(values.double()[1:], expected[1:], rtol=1e-5, atol=1e-5)
    assert float(values[0].detach()) == -200
    (slope,) = torch.autograd.grad(values.sum(), a)
    assert torch.isfinite(slope).all()


def test_the_loss_grows_by_beta_for_each_bit_of_divergence() -> None:
    """The prior is compared in bits (the paper's log2), torch's divergence counts nats."""
    defense = PRECODE(latent=8, beta=0.5)
    model = defense.model(models.build("lenet", size=8).double())
    bottleneck = bottleneck_of(model)
    seen: list[torch.Tensor] = []
    bottleneck.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.rand(3, 3, 8, 8).double())
    grown = defense.simulate_loss(torch.zeros((), dtype=torch.float64), model)
    mu, a = seen[0].chunk(2, dim=-1)
    posterior = torch.distributions.Normal(mu, torch.nn.functional.softplus(a))
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    nats = torch.distributions.kl_divergence(posterior, prior).sum(1)
    bits = nats / math.log(2)
    assert float(grown.detach()) == pytest.approx(0.5 * float(bits.mean().detach()), rel=1e-9)


@pytest.mark.parametrize("protocol", [FedSGD(), FedAVG(epochs=2, batch_size=2, lr=0.1)])
def test_the_adversarys_loss_holds_the_divergence(protocol: Protocol) -> None:
    view, x = observed(
        PRECODE(latent=8, beta=0.5, sigma_scale=1e-12), model="lenet", protocol=protocol
    )
    g = dict(view.update.tensors)
    assert relative_error(replayed(view, x), g) < 1e-8
    assert relative_error(replayed(view, x, adaptive=False), g) > 1e-3


def test_with_the_draws_disclosed_the_true_batch_is_an_exact_zero() -> None:
    model = SMALL.model(models.build("lenet", size=8).double())
    x, y = torch.rand(2, 3, 8, 8).double(), torch.tensor([0, 1])
    drawn = torch.randn(2, 8, dtype=torch.float64)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def upload(noise: torch.Tensor | None) -> dict[str, torch.Tensor]:
        bottleneck_of(model).noise = noise
        found = replays.gradient(model, parameters, {}, x, y, create_graph=False)
        return {name: tensor.detach() for name, tensor in found.items()}

    sent, oracle, blind = upload(drawn), upload(drawn), upload(None)
    assert all(torch.equal(sent[name], oracle[name]) for name in sent)
    assert relative_error(blind, sent) > 1e-3


def test_the_draws_can_be_fitted_by_their_gradient() -> None:
    model = SMALL.model(models.build("lenet", size=8).double())
    bottleneck = bottleneck_of(model)
    bottleneck.noise = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.rand(1, 3, 8, 8).double()
    found = replays.gradient(model, parameters, {}, x, torch.tensor([3]))
    (slope,) = torch.autograd.grad(found["body.0.weight"].square().sum(), bottleneck.noise)
    assert float(slope.norm()) > 0


def test_it_works_under_functional_call_and_double_backward() -> None:
    model = SMALL.model(models.build("lenet", size=8).double())
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return SMALL.simulate_loss(nn.functional.cross_entropy(logits, y), model)

    gradients = replays.gradient(model, parameters, {}, x, torch.tensor([0, 1]), loss=loss)
    (slope,) = torch.autograd.grad(gradients["body.0.weight"].square().sum(), x)
    assert torch.isfinite(slope).all()
    assert float(slope.norm()) > 0


def test_copies_carry_no_activations() -> None:
    model = SMALL.model(models.build("lenet", size=8))
    functional_call(model, model_state(model), (torch.rand(1, 3, 8, 8),))
    assert bottleneck_of(model)._divergence is not None
    clone = load_into(model, model_state(model))
    assert bottleneck_of(clone)._divergence is None


def test_the_readout_of_a_first_layer_is_exact_for_any_draw() -> None:
    for seed in range(3):
        assert readout_error(SMALL, seed=seed) < 1e-9
    assert readout_error(SMALL, dtype=torch.float32) < 1e-4


def test_tensors_in_front_of_the_bottleneck_vary_less_in_direction_than_those_behind() -> None:
    stage = build_stage(model="lenet", defenses=(PRECODE(),))
    uploads = [stage.federation.play_round().updates[0].tensors for _ in range(8)]

    def agreement(name: str) -> float:
        flat = torch.stack([u[name].flatten() for u in uploads])
        flat = flat / flat.norm(dim=1, keepdim=True)
        return float((flat @ flat.T).mean())

    assert agreement("body.0.weight") > agreement("fc.bottleneck.decoder.weight")


def test_a_model_without_a_linear_head_is_refused_with_a_way_out() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()), nn.Linear(4, 2)):
        with pytest.raises(UnsupportedModel, match="linear head"):
            SMALL.model(model)


def test_a_head_that_is_not_used_is_reported() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(192, 10)
            self.spare = nn.Linear(10, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(x.flatten(1))
            return out

    model = SMALL.model(Unused())
    model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UnsupportedModel, match="register the head last"):
        SMALL.simulate_loss(torch.zeros(()), model)
