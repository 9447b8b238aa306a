"""What a model is made of: the questions that attacks, defenses and reports ask any module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batchnorm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every batch normalisation layer by its name, in the order of the module tree."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}


def has_batchnorm(model: nn.Module) -> bool:
    """Whether the model has a batch normalisation layer of any dimension."""
    return bool(batchnorm_layers(model))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its name, in the order of the module tree."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def first_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The first linear layer and its name; None if there is none."""
    return next(iter(linear_layers(model).items()), None)


def last_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The last linear layer (the head of a classifier) and its name; None if there is none."""
    return next(reversed(linear_layers(model).items()), None)


def parameter_count(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of scalars in the parameters; shared parameters count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of a submodule, in its mode; ``model`` is changed.

    Args:
        model: Whose.
        name: Dotted, of a module inside the model.
        module: Instead.
    """
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, module.train(owner.get_submodule(child).training))


@contextmanager
def in_mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """A model in train or evaluation mode for a while; then every module has its own mode back.

    Modules may differ from their model (a frozen normalisation in a network that trains), so
    ``model.train(before)`` would not restore them.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(train)
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., object]) -> Iterator[None]:
    """A forward hook on some modules for a while."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def example_input(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """One black input ``(1, C, H, W)`` for a model: what a pass that looks at shapes needs.

    Args:
        model: Gives dtype and device; float32 on the CPU if it has no parameter.
        shape: ``(C, H, W)``.
    """
    like = next(model.parameters(), torch.empty(0))
    return like.new_zeros(1, *shape).detach()
