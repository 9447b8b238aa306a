"""FedLeak: what is compared, what the regularised slope approximates, and what both bring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic.fedleak import FedLeak, regularised, selected
from leakatlas.bench import harness
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.metrics import images as image_metrics
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage

CASE = Case({"steps": 3}, LENET, boxed=True)

GENERATOR = torch.Generator().manual_seed(0)


def test_the_largest_entries_of_every_tensor_are_compared() -> None:
    g = {"a": torch.tensor([[3.0, -5.0], [1.0, 0.0]]), "b": torch.tensor([0.0, 0.0, -1e-9])}
    masks = selected(g, 0.5, "largest", GENERATOR)
    assert masks["a"].tolist() == [[True, True], [False, False]]
    assert masks["b"].sum() == 2 and bool(masks["b"][2])
    assert selected(g, 0.01, "largest", GENERATOR)["a"].sum() == 1  # never none
    assert selected(g, 1.0, "largest", GENERATOR) == {}


def test_a_random_share_has_the_right_size_and_is_random() -> None:
    g = {"a": torch.randn(10, 20)}
    first, second = (selected(g, 0.3, "random", GENERATOR)["a"] for _ in range(2))
    assert first.sum() == second.sum() == 60
    assert not torch.equal(first, second)


def _quadratic() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    A = torch.randn(6, 6, generator=draw, dtype=torch.float64)
    return A @ A.T + torch.eye(6), torch.randn(6, generator=draw, dtype=torch.float64)


def test_the_slope_is_that_of_the_penalised_loss() -> None:
    """Closed form: f = x'Ax/2 has slope Ax, and |Ax| has slope A Ax / |Ax|; the difference along
    the slope is exact for a quadratic, at every radius."""
    A, x = _quadratic()
    slope = A @ x
    mix, radius = 0.3, 0.2
    rho = radius * len(x) ** 0.5
    leaf = x.clone().requires_grad_()
    value = regularised(lambda v: (0.5 * v @ A @ v, v.square().sum()), leaf, mix=mix, radius=radius)
    (found,) = torch.autograd.grad(value.total, leaf)
    expected = slope + mix * rho * A @ slope / slope.norm()
    torch.testing.assert_close(found, expected)
    assert float(value.total.detach()) == pytest.approx(float(0.5 * x @ slope))
    assert float(value.criterion) == pytest.approx(float(x.square().sum()))


def test_for_small_radii_the_slope_is_that_of_the_exact_penalty() -> None:
    def f(v: Tensor) -> tuple[Tensor, Tensor]:
        value = (v.sin() * v.roll(1).exp()).sum()
        return value, value

    x = torch.randn(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mix, radius = 1.0, 1e-5
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(regularised(f, leaf, mix=mix, radius=radius).total, leaf)
    exact = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(exact)[0], exact, create_graph=True)
    (plain, penalty) = first.detach(), torch.autograd.grad(first.norm(), exact)[0]
    rho = radius * len(x) ** 0.5
    torch.testing.assert_close((found - plain) / rho, penalty, rtol=1e-3, atol=1e-4)


def test_without_a_slope_it_stays_where_it_is() -> None:
    leaf = torch.zeros(3, dtype=torch.float64).requires_grad_()
    value = regularised(lambda v: (v.square().sum(),) * 2, leaf, mix=0.5, radius=0.1)
    (found,) = torch.autograd.grad(value.total, leaf)
    assert not found.any() and bool(torch.isfinite(value.total))


def _psnr(attack: FedLeak, protocol: Protocol, examples: int = 1, **scene: object) -> float:
    stage = build_stage(
        model="lenet", examples=examples, letter="C", protocol=protocol,
        grants=frozenset({Grant.LABELS}), **scene,  # type: ignore[arg-type]  # a scene's settings
    )  # fmt: skip
    trial = harness.run_trial(stage, attack)
    return float(image_metrics.psnr(trial.images.clamp(0, 1), trial.truth.images).mean())


def _grey(examples: int = 1) -> float:
    truth = build_stage(examples=examples).victims[0].images
    return float(image_metrics.psnr(torch.full_like(truth, 0.5), truth).mean())


QUICK = FedLeak(steps=150, lr=0.1, tv_weight=1e-3)


@pytest.mark.parametrize(
    "protocol", [FedSGD(), FedAVG(epochs=2, batch_size=1, lr=0.05)], ids=["fedsgd", "fedavg"]
)
def test_it_beats_the_grey_image(protocol: Protocol) -> None:
    assert _psnr(QUICK, protocol) > _grey() + 3


def test_a_hundredth_of_the_entries_is_too_little() -> None:
    """The failure that counting predicts: fewer equations than pixels."""
    few = replace(QUICK, share=0.01)
    assert _psnr(QUICK, FedSGD()) > _psnr(few, FedSGD()) + 3


def test_it_runs_through_train_mode_normalisation() -> None:
    stage = build_stage(
        model="convnet-bn", settings={"width": 4}, examples=4, letter="C",
        protocol=FedSGD(mode="train"), grants=frozenset({Grant.LABELS}),
    )  # fmt: skip
    found = replace(QUICK, steps=5)(stage.view([stage.federation.play_round()]))
    assert found.status == "complete"
    assert found.images.shape == (4, 3, 8, 8)
    assert 0 < found.notes["matching_loss"] < 1
