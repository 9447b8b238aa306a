"""Client-side DP: per-example gradients, sensitivities, distributed shares, the mirror."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from leakatlas import models
from leakatlas.defenses.formal.dp._examples import per_example_gradients
from leakatlas.defenses.formal.dp._mechanism import clipped_sum
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.errors import InvalidParameter, Unavailable, UnsupportedModel
from leakatlas.fl import (
    ClientContext,
    FedAVG,
    FedSGD,
    LocalStep,
    Protocol,
    stream,
    task_loss,
)
from leakatlas.threat import Grant
from tests.conftest import build_stage, gradients_at, relative_error
from tests.defenses.heuristic.probes import observed, replayed

PROTOCOLS: list[Protocol] = [
    FedSGD(),
    FedSGD(reduction="sum", mode="train"),
    FedAVG(epochs=2, batch_size=2, lr=0.05, momentum=0.9),
]
UNITS: list[dict[str, Any]] = [
    {"unit": "example"},
    {"unit": "update"},
    {"unit": "update", "share_of": 7},
]


def a_step(model: nn.Module, x: Tensor, y: Tensor, protocol: Protocol | None = None) -> LocalStep:
    protocol = protocol or FedSGD()
    summed = isinstance(protocol, FedSGD) and protocol.reduction == "sum"

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return task_loss(logits, target, "sum" if summed else "mean")

    model.train(protocol.mode == "train")
    context = ClientContext(0, 0, model, x, y, protocol, stream("noise"), {})
    return LocalStep(model, x, y, loss, 0, context)


def a_batch(count: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, size, size, generator=stream("x"), dtype=torch.float64)
    return x, torch.arange(count)


def a_model(name: str, **settings: Any) -> nn.Module:
    return models.build(name, classes=10, size=8, seed=0, **settings).double()


class Tapped(nn.Module):
    """Dropout, a direct parameter, and a parameter that takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((1, 3, 8, 8), 0.1, dtype=torch.float64))
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 10)
        ).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x + self.shift)
        return out


def gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).detach().abs().max()) for n in one)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("unit", UNITS)
def test_neutral_is_bitwise_undefended(protocol: Protocol, unit: dict[str, Any]) -> None:
    neutral = ClientDP(noise_multiplier=ClientDP.neutral, clip_norm=1e-3, **unit)
    setting: dict[str, Any] = {"protocol": protocol, "examples": 3, "clients": 2}
    plain = build_stage(**setting).federation.play_round()
    defended = build_stage(**setting, defenses=(neutral,)).federation.play_round()
    for client, update in plain.updates.items():
        sent = defended.updates[client].tensors
        assert all(torch.equal(sent[n], t) for n, t in update.tensors.items())
    assert neutral.active_traits() == frozenset()


@pytest.mark.parametrize("unit", UNITS)
def test_by_default_the_observation_differs_and_repeats_itself(unit: dict[str, Any]) -> None:
    plain, once, again = (
        build_stage(defenses=d).federation.play_round().updates[0].tensors
        for d in ((), (ClientDP(**unit),), (ClientDP(**unit),))
    )
    assert gap(plain, once) > 0.01
    assert gap(once, again) == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "model",
    [
        a_model("lenet", width=4),
        a_model("convnet", width=4, norm="group"),
        a_model("fc", widths=(12,)),
    ],
)
def test_per_example_gradients_equal_a_loop(model: nn.Module, mode: str, reduction: str) -> None:
    protocol = FedSGD.from_json({"reduction": reduction, "mode": mode})
    x, y = a_batch()
    got = per_example_gradients(
        a_step(model, x, y, protocol),
        protocol.reduction,
    )
    for i in range(len(x)):
        alone = gradients_at(model, x[i : i + 1], y[i : i + 1], task_loss)
        assert gap({n: t[i] for n, t in got.items()}, alone) < 1e-10


def test_model_is_left_as_it_was() -> None:
    model = Tapped()
    x, y = a_batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    got = per_example_gradients(a_step(model, x, y), "mean")
    alone = gradients_at_all(model, x[:1], y[:1])
    assert gap({n: t[0] for n, t in got.items()}, alone) < 1e-10
    assert not got["unused.weight"].any() and got["shift"].any()
    assert not any(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not hasattr(parameter, "grad_sample")
        assert torch.equal(parameter, before[name])
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def gradients_at_all(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(
        task_loss(model(x), y), list(named.values()), materialize_grads=True, allow_unused=True
    )
    return dict(zip(named, found, strict=True))


def test_clipped_sum_equals_opacus_own_optimizer() -> None:
    model = a_model("lenet", width=4)
    x, y = a_batch()
    ours = clipped_sum(per_example_gradients(a_step(model, x, y), "mean"), 0.3, "flat")
    wrapped = GradSampleModule(model.train(), loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=len(x),
    )
    task_loss(wrapped(x.clone().requires_grad_()), y).backward()
    optimizer.clip_and_accumulate()
    # Opacus adds 1e-6 to every norm before it divides.
    theirs: dict[str, Tensor] = {n: vars(p)["summed_grad"] for n, p in model.named_parameters()}
    assert gap(ours, theirs) < 1e-5


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_is_the_clipped_sum_plus_noise_at_the_joint_bound(
    clipping: str, reduction: str
) -> None:
    model = a_model("lenet", width=4)
    x, y = a_batch()

    def noisy(z: float) -> dict[str, Tensor]:
        defense = ClientDP.from_json(
            {"noise_multiplier": z, "clip_norm": 0.2, "clipping": clipping}
        )
        protocol = FedSGD.from_json({"reduction": reduction})
        return defense.local_step(a_step(model, x, y, protocol), lambda step: {})

    one, two = noisy(1.0), noisy(2.0)
    divisor = len(x) if reduction == "mean" else 1
    loop = {n: torch.zeros_like(t) for n, t in one.items()}
    for i in range(len(x)):
        g = gradients_at(model, x[i : i + 1], y[i : i + 1], task_loss)
        whole = math.sqrt(sum(float(t.square().sum()) for t in g.values()))
        for n, t in g.items():
            size = whole if clipping == "flat" else float(t.norm())
            loop[n] += t * min(1.0, 0.2 / size) / divisor
    assert gap({n: 2 * one[n] - two[n] for n in one}, loop) < 1e-10
    joint = 0.2 if clipping == "flat" else 0.2 * math.sqrt(len(one))
    drawn = torch.cat([(two[n] - one[n]).flatten() for n in one])
    assert abs(float(drawn.std()) / (joint / divisor) - 1) < 0.05


def test_example_dp_trains_through_fedavg_steps() -> None:
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.05)
    tiny = ClientDP(noise_multiplier=1e-9, clip_norm=1e3)
    plain = build_stage(protocol=protocol, examples=5).federation.play_round()
    record = build_stage(protocol=protocol, examples=5, defenses=(tiny,)).federation.play_round()
    assert gap(record.updates[0].tensors, plain.updates[0].tensors) < 1e-4
    assert "noise" not in ClientDP().secrets({})


def test_update_unit_clips_and_reveals_its_noise_as_the_secret() -> None:
    defense = ClientDP(unit="update", clipping="flat", clip_norm=0.1, noise_multiplier=0.5)
    stage = build_stage(defenses=(defense,), grants=frozenset({Grant.DEFENSE_SECRETS}))
    record = stage.federation.play_round()
    view = stage.view([record])
    client = stage.federation.clients[0]
    noise = {n.removeprefix("client_dp/"): t for n, t in view.secrets.items()}
    clean = {n: view.update.tensors[n] - noise[n] for n in noise}
    whole = torch.cat([t.flatten() for t in clean.values()])
    assert float(whole.norm()) == pytest.approx(0.1)
    # Oracle: with the secret disclosed, the mirror at the true batch is exact.
    assert gap(view.replay(client.x, client.y), view.update.tensors) < 1e-12


def test_one_examples_gradient_has_an_exact_mirror() -> None:
    defense = ClientDP(clip_norm=0.05, noise_multiplier=1.0)
    stage = build_stage(examples=1, defenses=(defense,), grants=frozenset({Grant.DEFENSE_SECRETS}))
    view = stage.view([stage.federation.play_round()])
    client = stage.federation.clients[0]
    replayed = view.replay(client.x, client.y)
    assert gap(replayed, view.update.tensors) < 1e-12


def test_ratio_readout_errs_by_what_the_drawn_noise_says() -> None:
    defense = ClientDP(clip_norm=1.0, noise_multiplier=0.01, clipping="flat")
    stage = build_stage(
        settings={"widths": (12,), "act": "relu"},
        examples=1,
        defenses=(defense,),
        grants=frozenset({Grant.DEFENSE_SECRETS}),
    )
    view = stage.view([stage.federation.play_round()])
    client = stage.federation.clients[0]
    weight, bias = "hidden.1.weight", "hidden.1.bias"
    sent, noise = view.update.tensors, {n: view.secrets[f"client_dp/{n}"] for n in (weight, bias)}
    row = int(sent[bias].abs().argmax())
    x, b = client.x.flatten(), sent[bias][row] - noise[bias][row]
    error = sent[weight][row] / sent[bias][row] - x
    # (b x + n_w) / (b + n_b) - x = (n_w - n_b x) / (b + n_b)
    predicted = (noise[weight][row] - noise[bias][row] * x) / (b + noise[bias][row])
    assert float(error.abs().max()) > 1e-3
    assert torch.allclose(error, predicted, atol=1e-9)


def test_shares_add_up_to_the_central_noise() -> None:
    count = 8
    whole = ClientDP(unit="update", clipping="flat", clip_norm=1e-6, noise_multiplier=1.0)
    share = ClientDP(
        unit="update", clipping="flat", clip_norm=1e-6, noise_multiplier=1.0, share_of=count
    )

    def summed(defense: ClientDP, clients: int) -> Tensor:
        stage = build_stage(
            settings={"widths": (64,)}, examples=1, clients=clients, defenses=(defense,)
        )
        aggregate = stage.federation.play_round().aggregate
        return torch.cat([t.flatten() for t in aggregate.tensors.values()]) * clients

    # 13,000 coordinates share a signal of norm 8e-6 at most: nothing beside the noise of each.
    assert float(summed(share, count).std()) == pytest.approx(1e-6, rel=0.05)
    assert float(summed(whole, count).std()) == pytest.approx(math.sqrt(8) * 1e-6, rel=0.05)


def test_epsilon_of_shares_depends_on_who_added_noise() -> None:
    share = ClientDP(unit="update", noise_multiplier=1.0, share_of=4)
    assert share.epsilon(rounds=1, delta=1e-5) == pytest.approx(4.377, abs=5e-4)
    alone = ClientDP(unit="update", noise_multiplier=0.5)
    assert share.epsilon(rounds=1, delta=1e-5, honest=1) == pytest.approx(
        alone.epsilon(rounds=1, delta=1e-5)
    )
    assert ClientDP(noise_multiplier=1.0).epsilon(
        rounds=10, steps_per_round=78, delta=1e-5, sampling_rate=64 / 5000
    ) == pytest.approx(2.12, abs=0.02)


def test_bound_decays_over_rounds() -> None:
    decay = ClientDP(clip_norm=6.0, final_clip_norm=2.0, decay_rounds=10)
    assert [decay.bound(r) for r in (0, 5, 10, 50)] == [6.0, 4.0, 2.0, 2.0]
    assert ClientDP().bound(7) == ClientDP().clip_norm == 4.0


def test_buffers_are_withheld() -> None:
    stage = build_stage(
        model="convnet-bn", settings={"width": 4}, protocol=FedAVG(batch_size=2),
        defenses=(ClientDP(unit="update"),),
    )  # fmt: skip
    update = stage.federation.play_round().updates[0]
    assert update.buffers_before and not update.buffers_after


def test_layers_that_keep_statistics_are_refused() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(192, 10),
    ).double()
    with pytest.raises(UnsupportedModel, match="GroupNorm"):
        per_example_gradients(a_step(model, *a_batch()), "mean")


def test_without_opacus_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "opacus"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unavailable, match=r"pip install 'leakatlas\[opacus\]'"):
        per_example_gradients(a_step(a_model("fc", widths=(4,)), *a_batch()), "mean")


def test_parameters() -> None:
    with pytest.raises(InvalidParameter, match="share_of"):
        ClientDP(share_of=3)
    with pytest.raises(InvalidParameter, match="noise_multiplier"):
        ClientDP(noise_multiplier=-1.0)
    defense = ClientDP(unit="update", share_of=3, final_clip_norm=2.0)
    assert ClientDP.from_json(defense.to_json()) == defense


@pytest.mark.parametrize("unit", ["update", "example"])
def test_with_the_very_noise_one_example_is_an_exact_zero(unit: Any) -> None:
    secret = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})
    defense = ClientDP(unit=unit, noise_multiplier=0.5, clip_norm=1.0)
    view, x = observed(defense, grants=secret, examples=1, settings={"width": 4, "norm": "group"})
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.05
