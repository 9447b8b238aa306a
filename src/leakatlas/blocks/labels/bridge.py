r"""Label counts although the head's own gradient is withheld: a bridge from the layer below.

Let v be the output of the highest layer whose bias gradient is still sent: linear, convolution or
normalisation. What that bias receives is, exactly,

.. math:: g = \frac1B \sum_i J_i^\top \delta_i, \qquad
          J_i = \partial z_i / \partial v, \quad \delta_i = p_i - y_i,

with z the logits; an output that is used at several places (a convolution's) sums over them. The
weights above v are known, the derivatives :math:`J_i` at the private inputs are not. If they do
not vary together with :math:`\delta_i` over the batch,

.. math:: g \approx \bar J^\top \bar\delta, \qquad \mathbf 1^\top \bar\delta = 0,

and auxiliary inputs give :math:`\bar J`. That is D equations for K - 1 unknowns, solved by least
squares; then the count identity ends the matter: :math:`n = B(\bar p - \bar\delta)` with
:math:`\bar p` from auxiliary inputs too. For one activation between v and the head,
:math:`\bar J = W\,\mathrm{diag}(\overline{\sigma'})`: weights times mean derivatives.

Exact: :math:`\bar\delta`, if everything above v is affine, as between a last normalisation and the
head of a transformer, or for B = 1 if the derivative at the
example itself is known. Fails: if the map from :math:`\bar\delta` to g has rank below K - 1, as
with fewer live outputs than K - 1 (refused); where derivatives follow the class, as on trained
networks; and as far as :math:`\bar p` is wrong.

References:
    Zhang, Chow and Li, "Building Gradient Bridges: Label Leakage from Restricted Gradient Sharing
    in Federated Learning", arXiv:2412.12640.

Departures: reconstructed from the method's description, without its code. The paper traces the
gradient from layer to layer, each with mean derivatives of its own; here the derivative of the
logits by v is averaged in one piece, which needs one assumption of independence instead of one a
layer, sees normalisation and shortcuts as they are, and leaves K - 1 unknowns rather than a wide
layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.blocks.labels import _checks
from leakatlas.blocks.labels.counts import counts_from_bias, mean_probability
from leakatlas.blocks.labels.head import Head
from leakatlas.errors import InvalidInput, UnsupportedModel
from leakatlas.models.structure import hooked, in_mode

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm,
)  # fmt: skip
_KINDS = (nn.Linear, nn.LayerNorm, *_CHANNELS_FIRST)

RANK = 1e-9
"""Singular values below this share of the largest say nothing in float64."""


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """What the adversary computes above a shared layer, on inputs of its own.

    Args:
        layer: Name of the layer.
        weight_name: Parameter name of its weight.
        bias_name: Parameter name of its bias; None if it has none or does not send it.
        jacobian: Mean derivative of the logits by the layer's output, ``(K, D)`` float64.
        mean_probability: Mean softmax output ``(K,)`` float64.
        mean_input: Mean input of a linear layer ``(F,)`` float64; None for other layers, which
            are chosen for their bias alone.
    """

    layer: str
    weight_name: str
    bias_name: str | None
    jacobian: Tensor
    mean_probability: Tensor
    mean_input: Tensor | None = None


def build_bridge(
    model: nn.Module, head: Head, auxiliary: Tensor, *, shared: Iterable[str]
) -> Bridge:
    """Average what lies above the highest shared layer, over auxiliary inputs in eval mode.

    Args:
        model: The global model; left as it was.
        head: Its head.
        auxiliary: Unlabelled inputs ``(N, ...)`` in the network's own space.
        shared: Names of the parameters whose gradients are sent.

    Raises:
        UnsupportedModel: If no layer below the head sends a bias gradient, and no linear layer
            its weight's.
        InvalidInput: If there is no auxiliary input.
    """
    if len(auxiliary) == 0:
        raise InvalidInput("build_bridge: needs at least one auxiliary input, got none.")
    layer, name = bridge_layer(model, head, auxiliary[:1], frozenset(shared))
    listed = {id(p): n for n, p in model.named_parameters()}
    assert isinstance(layer.weight, Tensor)  # normalisations are chosen by their bias
    outputs = layer.weight.shape[0]
    probe = torch.zeros(outputs, dtype=auxiliary.dtype, device=auxiliary.device).requires_grad_()
    seen: list[Tensor] = []

    def add_probe(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(arguments[0].detach())
        if isinstance(layer, _CHANNELS_FIRST):
            return output + probe.reshape(-1, *[1] * (output.dim() - 2))
        return output + probe

    logits = _run(model, layer, add_probe, auxiliary)
    mean = logits.mean(dim=0)
    rows = [
        torch.autograd.grad(mean[k], probe, retain_graph=k + 1 < len(mean))[0]
        for k in range(len(mean))
    ]
    bias_name = None if layer.bias is None else listed[id(layer.bias)]
    return Bridge(
        layer=name,
        weight_name=listed[id(layer.weight)],
        bias_name=bias_name if bias_name in set(shared) else None,
        jacobian=torch.stack(rows).double(),
        mean_probability=mean_probability(logits),
        mean_input=seen[-1].double().flatten(0, -2).mean(dim=0)
        if isinstance(layer, nn.Linear)
        else None,
    )


def output_gradient(gradients: Mapping[str, Tensor], bridge: Bridge) -> Tensor:
    r"""The mean gradient at the layer's output ``(D,)``: its bias gradient.

    Without a bias, :math:`\partial L / \partial W = \frac1B \sum_i v'_i h_i^\top` is taken for
    :math:`\bar v' \bar h^\top` with the auxiliary mean input :math:`\bar h`, and multiplied by
    :math:`\bar h / |\bar h|^2`.

    Raises:
        UnsupportedModel: If the layer has no bias and its mean input vanishes or is not known.
        InvalidInput: If the update lacks the gradient.
    """
    name = bridge.weight_name if bridge.bias_name is None else bridge.bias_name
    if name not in gradients:
        raise InvalidInput(f"gdbr: the update does not hold {name!r}, on which the bridge stands.")
    g = gradients[name].detach().double()
    if bridge.bias_name is not None:
        return g
    h = bridge.mean_input
    if h is None or float(h @ h) == 0:
        raise UnsupportedModel(
            f"gdbr: layer {bridge.layer!r} sends no bias gradient, and its mean input is "
            + ("not known." if h is None else "zero.")
        )
    return g @ h / (h @ h)


def logit_gradient(output_grad: Tensor, jacobian: Tensor) -> Tensor:
    r"""Least squares of :math:`g = \bar J^\top \bar\delta` under :math:`\sum_c \bar\delta_c = 0`.

    Args:
        output_grad: g ``(D,)``.
        jacobian: :math:`\bar J` ``(K, D)``.

    Returns:
        The mean logit gradient ``(K,)`` float64, which is the head's bias gradient.

    Raises:
        UnsupportedModel: If fewer than K - 1 of its directions reach the layer.
    """
    _checks.vector("logit_gradient", "output_grad", output_grad)
    _checks.matrix("logit_gradient", jacobian)
    classes = len(jacobian)
    # Any orthonormal basis of the vectors that sum to 0: the columns of Q beyond the first.
    ones = torch.ones(classes, 1, dtype=torch.float64, device=jacobian.device)
    basis = torch.linalg.qr(ones, mode="complete").Q[:, 1:]
    system = jacobian.double().T @ basis  # (D, K-1)
    u, s, vh = torch.linalg.svd(system, full_matrices=False)
    rank = int((s > RANK * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
    if rank < classes - 1:
        raise UnsupportedModel(
            f"gdbr: {classes} classes need {classes - 1} independent equations, the layer's "
            f"{jacobian.shape[1]} outputs give {rank}; too narrow a layer, or derivatives that "
            "vanish above it."
        )
    solution: Tensor = basis @ (vh.T @ ((u.T @ output_grad.double()) / s))
    return solution


def gdbr(gradients: Mapping[str, Tensor], bridge: Bridge, batch_size: int) -> Tensor:
    """Real-valued label counts ``(K,)``, from the layers below the head alone.

    Args:
        gradients: Mean-reduced, by parameter name; the head's are not read.
        bridge: From :func:`build_bridge`.
        batch_size: B.
    """
    delta = logit_gradient(output_gradient(gradients, bridge), bridge.jacobian)
    return counts_from_bias(delta, bridge.mean_probability, batch_size)


def bridge_layer(
    model: nn.Module, head: Head, example: Tensor, shared: frozenset[str]
) -> tuple[nn.Module, str]:
    """The last layer executed below the head with a bias gradient, or a linear one without.

    Args:
        model: Left as it was.
        head: Its head.
        example: One input ``(1, ...)``.
        shared: Names of the parameters whose gradients are sent.

    Returns:
        The layer and its name.

    Raises:
        UnsupportedModel: If there is none.
    """
    listed = {id(p): n for n, p in model.named_parameters()}
    names = {id(m): n for n, m in model.named_modules()}
    order: list[nn.Module] = []

    def note(module: nn.Module, _inputs: object, _output: object) -> None:
        order.append(module)

    layers = [module for module in model.modules() if isinstance(module, _KINDS)]
    with in_mode(model, train=False), hooked(layers, note):
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(example)
    for layer in reversed(order):
        weight, bias = listed.get(id(layer.weight)), listed.get(id(layer.bias))
        if weight == head.weight_name:
            continue
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
            continue  # a bias for every place: its gradient is no sum over places
        if bias in shared or (isinstance(layer, nn.Linear) and weight in shared):
            return layer, names[id(layer)]
    raise UnsupportedModel(
        f"gdbr: no layer of {type(model).__name__} below the head sends a bias gradient, and no "
        "linear layer its weight's; there is nothing to build a bridge on."
    )


def _run(model: nn.Module, layer: nn.Module, hook: Callable[..., object], inputs: Tensor) -> Tensor:
    """Logits in eval mode with a hook on one layer, differentiable by what the hook adds."""
    frozen = {n: p.detach() for n, p in model.named_parameters()}
    with in_mode(model, train=False), hooked([layer], hook):
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            logits: Tensor = functional_call(model, frozen, (inputs,))
    return logits
