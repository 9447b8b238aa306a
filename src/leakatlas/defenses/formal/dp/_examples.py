"""Gradients of single examples, by Opacus' hooks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from leakatlas.defenses.formal.dp._accounting import missing_opacus
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import LocalStep
from leakatlas.fl.state import trained


def per_example_gradients(
    step: LocalStep, reduction: Literal["mean", "sum"], who: str = "client_dp(unit='example')"
) -> dict[str, Tensor]:
    """Gradient of every example's own loss, by parameter name ``(B, *shape)``.

    Args:
        step: The local step; its model is left as it was.
        reduction: How ``step.loss`` reduces over examples.
        who: Asks for them, in messages.

    Raises:
        Unavailable: If Opacus is not installed.
        UnsupportedModel: If a layer with parameters also keeps buffers, as normalisation with
            running statistics does.
    """
    try:
        from opacus.grad_sample import GradSampleModule
    except ModuleNotFoundError:
        raise missing_opacus(who) from None
    model, named = step.model, dict(trained(step.model))
    held = {name: parameter.grad for name, parameter in named.items()}
    try:
        hooked = GradSampleModule(model, loss_reduction=reduction)
    except NotImplementedError as problem:
        raise UnsupportedModel(
            f"{who} needs per-example gradients of {type(model).__name__}: "
            f"{problem}. Use GroupNorm, or unit='update'."
        ) from None
    # Opacus records layers in training mode only. Layers with parameters compute the same in both
    # modes (those that do not, keep buffers and were refused), so only their flag is raised;
    # dropout and the like keep the mode of the protocol.
    asleep = [m for m in _layers_with_parameters(model) if not m.training]
    try:
        for module in asleep:
            module.training = True
        # Backward hooks on the first layer fire properly only if its input is differentiated too.
        step.loss(hooked(step.x.detach().requires_grad_()), step.y).backward()
        # Parameters that took no part in the loss have no gradient, of any example.
        found = {
            name: torch.zeros(len(step.x), *p.shape, dtype=p.dtype, device=p.device)
            if each is None
            else each.detach()
            for name, p in named.items()
            for each in [getattr(p, "grad_sample", None)]
        }
    finally:
        for module in asleep:
            module.training = False
        hooked.to_standard_module()
        for name, parameter in named.items():
            parameter.grad = held[name]
    return found


def _layers_with_parameters(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
