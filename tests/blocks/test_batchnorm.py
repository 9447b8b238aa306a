from __future__ import annotations

import pytest
import torch
from torch import nn

from leakatlas import models
from leakatlas.blocks import batchnorm
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.fl import batchnorm_statistics
from leakatlas.fl.state import model_state


def network(mode: str = "eval") -> nn.Module:
    model = models.build("convnet-bn", size=8, width=4, classes=5, seed=1).double()
    return model.train(mode == "train")


def batch(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_zero_at_the_truth_and_only_there(mode: str) -> None:
    model, x = network(mode), batch()
    penalty = batchnorm.prior(model, batchnorm_statistics(model, model_state(model), x))
    assert float(penalty(x)) == 0
    assert float(penalty(x.flip(0))) == pytest.approx(0, abs=1e-12)
    assert float(penalty(batch(1))) > 0.1


def test_distance_by_hand() -> None:
    here = {"a": (torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0]))}
    there = {"a": (torch.zeros(2), torch.tensor([2.0, 1.0]))}
    assert float(batchnorm.distance(here, there)) == pytest.approx(5 + 1, rel=1e-5)
    assert float(batchnorm.distance(here, there, first_weight=10)) == pytest.approx(60, rel=1e-5)


def test_the_weight_goes_to_the_first_executed_layer() -> None:
    statistics = {"near": (torch.ones(1), torch.zeros(1)), "far": (torch.ones(1), torch.zeros(1))}
    target = {"far": (torch.zeros(1),) * 2, "near": (torch.zeros(1),) * 2}
    far_off = {**statistics, "far": (3 * torch.ones(1), torch.zeros(1))}
    assert float(batchnorm.distance(statistics, target, first_weight=10)) == pytest.approx(
        11, rel=1e-5
    )
    assert float(batchnorm.distance(far_off, target, first_weight=10)) == pytest.approx(
        13, rel=1e-5
    )


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradient_against_finite_differences(mode: str) -> None:
    model = network(mode)
    target = batchnorm_statistics(model, model_state(model), batch())
    penalty = batchnorm.prior(model, target)
    x = batch(2)
    direction = batch(3)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(penalty(leaf), leaf)
    step = 1e-6
    numeric = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric.detach(), rtol=1e-5, atol=1e-8)


def test_running_statistics_are_copies_and_the_model_stays_untouched() -> None:
    model = network("train")
    before = model_state(model)
    target = batchnorm.running_statistics(model)
    assert list(target) == list(batchnorm_statistics(model, before, batch()))
    batchnorm.prior(model, target)(batch())
    after = model_state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    next(iter(target.values()))[0].add_(1)
    assert all(torch.equal(before[n], t) for n, t in model_state(model).items())


def test_models_without_statistics_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no BN layer"):
        batchnorm.running_statistics(models.build("convnet", size=8, width=4))
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(UnsupportedModel, match="keeps no running statistics"):
        batchnorm.running_statistics(bare)


def test_a_layer_never_reached_is_named() -> None:
    target = {"gone": (torch.zeros(1), torch.ones(1))}
    with pytest.raises(InvalidInput, match="'gone'"):
        batchnorm.distance({}, target)
    with pytest.raises(InvalidInput, match="at least one layer"):
        batchnorm.distance({"a": (torch.zeros(1), torch.ones(1))}, {})
