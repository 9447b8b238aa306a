"""The classification head: which tensors of an update carry the labels.

The head is the last ``nn.Linear``, the one that produces the logits. It is found by what the model
does (or declares), and its gradients are taken by parameter name. "The last one-dimensional
gradient is the bias" is wrong as soon as a head has no bias and a normalisation layer has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.models.structure import hooked, in_mode


@dataclass(frozen=True, kw_only=True)
class Head:
    """Names and sizes of the last linear layer, ``z = W h + b``.

    Args:
        weight_name: Parameter name of W ``(K, D)``.
        bias_name: Parameter name of b ``(K,)``; None for a head without bias.
        in_features: D, width of the features h.
        classes: K, number of logits.
        module_name: Name of the layer in the model.
    """

    weight_name: str
    bias_name: str | None
    in_features: int
    classes: int
    module_name: str = ""

    def weight_grad(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient of W, ``(K, D)``, from gradients by parameter name."""
        return _pick(gradients, self.weight_name, (self.classes, self.in_features))

    def bias_grad(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The gradient of b, ``(K,)``.

        Raises:
            UnsupportedModel: If the head has no bias.
        """
        if self.bias_name is None:
            raise UnsupportedModel(
                f"the head {self.module_name or self.weight_name!r} has no bias, so the update has "
                "no bias gradient; use a rule that reads the weights (column_min, sum rule, rlg)."
            )
        return _pick(gradients, self.bias_name, (self.classes,))


def _pick(gradients: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in gradients:
        held = ", ".join(list(gradients)[-4:]) or "nothing"
        raise InvalidInput(
            f"label recovery reads the head's {name!r}, which the update does not hold; it ends "
            f"with: {held}."
        )
    if tuple(gradients[name].shape) != shape:
        raise InvalidInput(
            f"label recovery: the update's {name!r} must be {shape}, got "
            f"{tuple(gradients[name].shape)}."
        )
    return gradients[name].detach()


def find_head(model: nn.Module, example: Tensor | None = None) -> Head:
    """Find the last Linear, by running the model or by the order of its modules.

    Args:
        model: A classifier that returns logits ``(N, K)``.
        example: Any input of the right shape, e.g. zeros ``(1, C, H, W)``. With it the model is run
            once in eval mode (buffers, mode flags and the global generator are left as they were)
            and the head is the last Linear *executed*. Without it the head is the last Linear
            *registered*, which must then be the last layer with parameters at all.

    Raises:
        UnsupportedModel: If there is no such layer, if its width is not that of the output, or if
            its weight is not a plain parameter (weight norm, lazy or quantised layers).
    """
    names = {id(module): name for name, module in model.named_modules()}
    if example is None:
        owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
        if not owners or not isinstance(owners[-1], nn.Linear):
            last = type(owners[-1]).__name__ if owners else "none"
            raise UnsupportedModel(
                f"find_head({type(model).__name__}): expected the last layer with parameters to be "
                f"a Linear, got {last}; pass example=, to find the head by running the model."
            )
        layer = owners[-1]
    else:
        layer = _last_executed(model, example)
    return _describe(model, layer, names[id(layer)])


def _last_executed(model: nn.Module, example: Tensor) -> nn.Linear:
    executed: list[tuple[nn.Linear, Tensor]] = []

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        executed.append((module, output))

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # In evaluation mode BN statistics and dropout stay out of it.
    with in_mode(model, train=False), hooked(linear, note):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(example)
    if not isinstance(logits, Tensor):
        raise UnsupportedModel(
            f"find_head({type(model).__name__}): expected one tensor of logits, got "
            f"{type(logits).__name__}; wrap the model so that it returns the logits."
        )
    if not executed:
        raise UnsupportedModel(
            f"find_head({type(model).__name__}): the forward pass ran no Linear layer; label "
            "recovery needs a linear head."
        )
    layer, output = executed[-1]
    if output.shape != logits.shape:
        raise UnsupportedModel(
            f"find_head({type(model).__name__}): expected the last Linear to produce the logits "
            f"{tuple(logits.shape)}, but it gives {tuple(output.shape)}; label recovery needs a "
            "linear head."
        )
    return layer


def _describe(model: nn.Module, layer: nn.Linear, name: str) -> Head:
    # identity, not name: a tied weight is listed (and shared) under its first name only
    listed = {id(parameter): key for key, parameter in model.named_parameters()}
    weight_name = listed.get(id(layer.weight))
    if weight_name is None or isinstance(layer.weight, nn.UninitializedParameter):
        raise UnsupportedModel(
            f"find_head({type(model).__name__}): the weight of {name!r} is not a plain parameter "
            "(reparametrised or not yet initialised); its update does not carry W directly."
        )
    return Head(
        weight_name=weight_name,
        bias_name=None if layer.bias is None else listed[id(layer.bias)],
        in_features=layer.in_features,
        classes=layer.out_features,
        module_name=name,
    )
