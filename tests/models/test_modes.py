"""A model in another mode for a while, hooks for a while, and an input to look with."""

import pytest
import torch
from torch import Tensor, nn

from leakatlas.models.structure import example_input, hooked, in_mode


def mixed() -> nn.Sequential:
    """A network that trains around a frozen normalisation."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model.train()
    model[1].eval()
    return model


@pytest.mark.parametrize("train", [True, False])
def test_every_module_gets_its_own_mode_back(train: bool) -> None:
    model = mixed()
    before = [module.training for module in model.modules()]
    with in_mode(model, train=train):
        assert all(module.training is train for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert before == [True, True, False, True]


def test_an_error_restores_the_modes_too() -> None:
    model = mixed()
    with pytest.raises(ValueError, match="stop"), in_mode(model, train=False):
        raise ValueError("stop")
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_hooks_are_gone_afterwards() -> None:
    model, seen = mixed(), []

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        seen.append((module, output))

    with in_mode(model, train=False), hooked([model[0]], note):
        model(torch.zeros(2, 4))
    model(torch.zeros(2, 4))
    assert [module for module, _ in seen] == [model[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_example_is_black_and_fits_the_model(dtype: torch.dtype) -> None:
    example = example_input(nn.Conv2d(3, 4, 3).to(dtype), (3, 8, 6))
    assert example.shape == (1, 3, 8, 6) and example.dtype == dtype
    assert not example.any() and not example.requires_grad
    assert example_input(nn.Flatten(), (1, 2, 2)).shape == (1, 1, 2, 2)
