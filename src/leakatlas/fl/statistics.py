"""Batch statistics at the inputs of BN layers, differentiable in the batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batchnorm_statistics(
    model: nn.Module, state: Mapping[str, Tensor], x: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per-channel mean and biased variance of every BN layer's input.

    Args:
        model: The architecture, in the mode in which the batch is to be seen.
        state: Parameters and buffers by name; buffers are not changed.
        x: ``(N, C, H, W)``, model space.

    Returns:
        ``{layer name: (mean (C,), variance (C,))}`` in order of execution.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0]
            axes = [d for d in range(features.dim()) if d != 1]
            variance, mean = torch.var_mean(features, dim=axes, correction=0)
            found[name] = (mean, variance)

        return hook

    handles = [
        module.register_forward_pre_hook(record(name))  # type: ignore[arg-type]  # torch's hook type
        for name, module in model.named_modules()
        if isinstance(module, _BATCHNORM)
    ]
    try:
        functional_call(model, {name: tensor.clone() for name, tensor in state.items()}, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return found
