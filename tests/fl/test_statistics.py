from __future__ import annotations

import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.fl import batchnorm_statistics, model_state, state_hash


def _batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 8, 8, generator=generator, dtype=torch.float64)


def test_the_first_layer_sees_the_mean_and_biased_variance_of_the_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(192)).double()
    x = _batch()
    found = batchnorm_statistics(model.eval(), model_state(model), x)
    assert list(found) == ["0", "2"]
    mean, variance = found["0"]
    assert torch.allclose(mean, x.sum((0, 2, 3)) / 320)
    assert torch.allclose(variance, ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / 320)
    flat = x.flatten(1) / (1 + 1e-5) ** 0.5  # eval mode: running mean 0, running variance 1
    assert torch.allclose(found["2"][0], flat.mean(0))
    assert torch.allclose(found["2"][1], flat.var(0, correction=0))


def test_train_mode_changes_what_deeper_layers_see() -> None:
    model = models.build("convnet-bn", size=8).double()
    x = _batch()
    train = batchnorm_statistics(model.train(), model_state(model), x)
    evaluated = batchnorm_statistics(model.eval(), model_state(model), x)
    first, *rest = train
    assert torch.equal(train[first][0], evaluated[first][0])
    assert all(not torch.allclose(train[n][0], evaluated[n][0]) for n in rest) and rest


def test_the_model_is_as_before_and_holds_no_hook() -> None:
    model = models.build("convnet-bn", size=8).double().train()
    before = state_hash(model_state(model))
    batchnorm_statistics(model, model_state(model), _batch())
    assert state_hash(model_state(model)) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_forward_pass_fails() -> None:
    model = models.build("convnet-bn", size=8).double()
    for wrong in (torch.zeros(1, 4, 8, 8, dtype=torch.float64), torch.zeros(2, 3, 8, 8)):
        try:
            batchnorm_statistics(model, model_state(model), wrong)
            failed = False
        except RuntimeError:
            failed = True
        assert failed and not any(m._forward_pre_hooks for m in model.modules())


def test_statistics_are_differentiable_in_the_batch() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    x = _batch().requires_grad_()
    mean, variance = batchnorm_statistics(model, model_state(model), x)["0"]
    (slope,) = torch.autograd.grad(mean.sum() + variance.sum(), x)
    by_hand = 1 / 320 + 2 * (x - mean[:, None, None]) / 320
    assert torch.allclose(slope, by_hand)
