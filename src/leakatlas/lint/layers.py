"""What the checks see of a model: its linear layers and convolutions, from names and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput
from leakatlas.fl import model_state
from leakatlas.models.structure import last_linear


@dataclass(frozen=True)
class Layer:
    """A weight with at least two dimensions, and the bias beside it.

    Args:
        name: Module name, ``block.first`` for the parameter ``block.first.weight``.
        parameter: Name of the weight.
        weight: ``(m, n)`` of a linear layer, ``(m, c, h, w)`` of a convolution.
        bias: ``(m,)`` or None.
    """

    name: str
    parameter: str
    weight: Tensor
    bias: Tensor | None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer (or an embedding)."""
        return self.weight.dim() == 2

    @property
    def rows(self) -> Tensor:
        """``(m, n)``: one row for each output."""
        return self.weight.flatten(1)


@dataclass(frozen=True)
class Anatomy:
    """The layers of one model.

    Args:
        layers: In the order of the state.
        head: Name of the last linear layer, if there is one.
        ordered: Whether the order is that of the architecture; a safetensors file sorts names.
        state: Everything, by name.
    """

    layers: tuple[Layer, ...]
    head: str | None
    ordered: bool
    state: Mapping[str, Tensor]

    @property
    def linear(self) -> tuple[Layer, ...]:
        """The linear layers only."""
        return tuple(layer for layer in self.layers if layer.linear)

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        """The convolutions only."""
        return tuple(layer for layer in self.layers if not layer.linear)


def anatomy(model: nn.Module | Mapping[str, Tensor]) -> Anatomy:
    """The layers of a module, or of a state dict.

    Raises:
        InvalidInput: If there is no floating point tensor of two dimensions, or a value is not
            finite.
    """
    state = model_state(model) if isinstance(model, nn.Module) else dict(model)
    found = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise InvalidInput(
                f"lint expects tensors by name; {name!r} is a {type(tensor).__name__}."
            )
        if not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InvalidInput(
                f"{name!r} holds {bad} values that are not finite (of {tensor.numel()}); no client "
                "can train on this model."
            )
        if tensor.dim() < 2 or min(tensor.shape[:2]) < 1 or tensor.shape[0] == 1 < tensor.dim() - 1:
            continue  # scalars, biases, norms; class tokens and position tables (1, T, d)
        found.append(Layer(_module_name(name), name, _plain(tensor), _bias(name, tensor, state)))
    if not found:
        raise InvalidInput(
            f"lint found no weight with two or more dimensions among {len(state)} tensors; give "
            "the whole state dict of a model."
        )
    layers = tuple(found)
    if isinstance(model, nn.Module):
        last = last_linear(model)
        return Anatomy(layers, None if last is None else last[0], True, state)
    names = list(state)
    return Anatomy(layers, _guess_head(layers), names != sorted(names), state)


def _guess_head(layers: tuple[Layer, ...]) -> str | None:
    """The linear layer whose outputs no other layer reads; of several, the narrowest."""
    linear = [layer for layer in layers if layer.linear]
    inputs = {layer.rows.shape[1] for layer in linear}
    ends = [layer for layer in linear if len(layer.rows) not in inputs] or linear
    return min(ends, key=lambda layer: len(layer.rows)).name if ends else None


def _module_name(parameter: str) -> str:
    for ending in (".weight", "_weight"):
        if parameter.endswith(ending):
            return parameter.removesuffix(ending)
    return parameter


def _bias(parameter: str, weight: Tensor, state: Mapping[str, Tensor]) -> Tensor | None:
    if not parameter.endswith("weight"):
        return None
    bias = state.get(parameter.removesuffix("weight") + "bias")
    return _plain(bias) if bias is not None and bias.shape == weight.shape[:1] else None


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
