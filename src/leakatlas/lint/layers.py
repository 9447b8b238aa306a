"""What the checks see of a model: its linear layers and convolutions, from names and tensors.

A network with ReLU computes the same with ``s w`` in one layer and ``w' / s`` in the next, so the
size of a layer says nothing. What counts is a row's direction, and a bias against what the row
makes of its inputs. Every layer is therefore judged with its columns at the size of what they are
fed: column j times the norm of row j of the layer before, that one judged in the same way. In
these units nothing changes under any positive rescaling, of whole layers or of single neurons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput
from leakatlas.fl import model_state
from leakatlas.lint.values import values_of
from leakatlas.models.structure import last_linear

USUAL = 3**-0.5
"""Norm of a row at PyTorch's own initialisation: a unit of size that leaves such models alone."""

CHUNK = 2**22
"""Entries that are turned into float64 at once."""


@dataclass(frozen=True)
class Layer:
    """A weight with at least two dimensions, and the bias beside it.

    Args:
        name: Module name, ``block.first`` for the parameter ``block.first.weight``.
        parameter: Name of the weight.
        weight: ``(m, n)`` of a linear layer, ``(m, c, h, w)`` of a convolution.
        bias: ``(m,)`` or None.
        fed: ``(n,)`` in float64, size of what every column is fed; None at the input, behind a
            normalisation, and where the order of the layers is not known.
    """

    name: str
    parameter: str
    weight: Tensor
    bias: Tensor | None
    fed: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer (or an embedding)."""
        return self.weight.dim() == 2

    @property
    def rows(self) -> Tensor:
        """``(m, n)`` as received: one row for each output."""
        return self.weight.flatten(1)

    def sized(self, rows: Tensor) -> Tensor:
        """Some of the rows ``(r, n)`` in float64, columns at the size of what they are fed."""
        rows = rows.double()
        return rows if self.fed is None else rows * self.fed

    def chunk(self) -> int:
        """How many rows are turned into float64 at once."""
        return max(CHUNK // self.rows.shape[1], 1)

    def norms(self) -> Tensor:
        """``(m,)`` in float64, of the sized rows."""
        parts = self.rows.split(self.chunk())
        return torch.cat([norms(self.sized(part)) for part in parts])


def norms(rows: Tensor) -> Tensor:
    """Norms ``(m,)`` of rows ``(m, n)`` in float64, right wherever the values themselves are."""
    largest = rows.abs().amax(dim=1)
    safe = torch.where(largest > 0, largest, torch.ones_like(largest))
    found: Tensor = largest * (rows / safe[:, None]).norm(dim=1)
    return found


def unit_rows(rows: Tensor) -> Tensor:
    """The rows ``(m, n)`` that are not zero, at length 1."""
    largest = rows.abs().amax(dim=1)
    rows = rows[largest > 0] / largest[largest > 0][:, None]
    found: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return found


@dataclass(frozen=True)
class Anatomy:
    """The layers of one model.

    Args:
        layers: In the order of the state.
        head: Name of the last linear layer, if there is one.
        ordered: Whether the order is that of the architecture; a safetensors file sorts names.
        state: Everything, by name.
        passed_over: Tensors of two or more dimensions that are no weights: integers, masks.
    """

    layers: tuple[Layer, ...]
    head: str | None
    ordered: bool
    state: Mapping[str, Tensor]
    passed_over: tuple[str, ...] = ()

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
        InvalidInput: If there is no weight of two dimensions, or a tensor that cannot be judged
            (see :mod:`leakatlas.lint.values`).
    """
    if not isinstance(model, nn.Module | Mapping):
        raise InvalidInput(
            f"lint expects a module or tensors by name, got a {type(model).__name__}."
        )
    state = model_state(model) if isinstance(model, nn.Module) else dict(model)
    values = {name: values_of(name, tensor) for name, tensor in state.items()}
    judged = {name: tensor for name, tensor in values.items() if tensor is not None}
    found = [
        Layer(_module_name(name), name, tensor, _bias(name, tensor, judged))
        for name, tensor in judged.items()
        if _is_layer(tensor)
    ]
    if not found:
        raise InvalidInput(
            f"lint found no weight with two or more dimensions among {len(state)} tensors; give "
            "the whole state dict of a model."
        )
    names = list(state)
    ordered = isinstance(model, nn.Module) or names != sorted(names)
    layers = tuple(_fed(found, judged, ordered))
    if isinstance(model, nn.Module):
        last = last_linear(model)
        head = None if last is None else last[0]
    else:
        head = _guess_head(layers)
    passed_over = tuple(n for n, v in values.items() if v is None and state[n].dim() > 1)
    return Anatomy(layers, head, ordered, state, passed_over)


def _is_layer(tensor: Tensor) -> bool:
    """Not a scalar, bias, norm; a class token or a table of positions (1, T, d); or empty."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return False
    return tensor.shape[0] > 1 or tensor.dim() == 2


# -- what a layer is fed ---------------------------------------------------------------------------


def _fed(found: list[Layer], judged: Mapping[str, Tensor], ordered: bool) -> Iterable[Layer]:
    """The layers in their order, each with the size of its inputs where it can be told.

    Names that are sorted are read in their natural order (2 before 10); among them a normalisation
    cannot be placed, so that sizes are told only where there is none.
    """
    order = list(judged) if ordered else sorted(judged, key=_natural)
    normalised = any(_is_norm(name, judged[name]) for name in order)
    by_parameter = {layer.parameter: layer for layer in found}
    made: dict[str, Layer] = {}
    before: Layer | None = None
    for name in order:
        if name in by_parameter:
            layer = by_parameter[name]
            fed = None if before is None else _sizes(before, layer)
            made[name] = Layer(layer.name, name, layer.weight, layer.bias, fed)
            before = None if normalised and not ordered else made[name]
        elif _is_norm(name, judged[name]):
            before = None
    return [made[layer.parameter] for layer in found]


def _sizes(before: Layer, layer: Layer) -> Tensor | None:
    """Row norms of ``before``, one for each column of ``layer``.

    Where the shapes do not tell which output feeds which column (grouped convolutions, an image
    made of a linear layer's outputs), every column gets the mean.
    """
    sizes = before.norms() / USUAL
    live = sizes > 0
    if not bool(live.any()):
        return None
    mean = sizes[live].mean()
    columns, inputs = layer.rows.shape[1], layer.weight.shape[1]
    # Flattening makes a block of columns of every channel; a kernel has its taps.
    flattened = layer.linear and not before.linear and inputs % len(sizes) == 0
    if inputs != len(sizes) and not flattened:
        return mean.expand(columns)
    # A neuron without weights gives a constant: taken at the size of its layer.
    return torch.where(live, sizes, mean).repeat_interleave(columns // len(sizes))


def _is_norm(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 1 and name.endswith(("weight", "running_mean"))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


# -- names -----------------------------------------------------------------------------------------


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


def _bias(parameter: str, weight: Tensor, judged: Mapping[str, Tensor]) -> Tensor | None:
    if not parameter.endswith("weight"):
        return None
    bias = judged.get(parameter.removesuffix("weight") + "bias")
    return bias if bias is not None and bias.shape == weight.shape[:1] else None
