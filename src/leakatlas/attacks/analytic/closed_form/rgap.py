r"""R-GAP: one linear system per layer, from the last layer back to the pixels.

Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021. FedSGD, one example,
one round, passive. Letter B: the gradient, the weights, the pixel box (to rank candidates).

With x_i the input of layer i, z_i its output before the activation, and k_i = dL/dz_i,

.. math:: k_i = \sigma'(z_i) \odot (W_{i+1}^T k_{i+1}), \qquad
          K_i x_i = \mathrm{vec}(G_i), \qquad W_i x_i = z_i = \sigma^{-1}(x_{i+1}) .

1. *Start* at the earliest linear layer whose k is known. A linear layer with a bias shows it:
   k = G_b. Without any bias, the logits' own scale is found by a root: for one logit and the
   logistic loss, with mu = y u, <G, W> = -mu / (1 + e^mu), which has one root if it is positive
   and two otherwise (Lambert W), for either label; for a softmax of K logits the gradient is an
   outer product whose scale must agree with the softmax that it implies.
2. Linear layer: x = sum_j k_j G[j] / sum_j k_j^2.
3. Convolution: gradient constraints and weight constraints in one least-squares problem; its
   *rank* says whether the layer lost information. :func:`rank_analysis` tells that beforehand.
4. Every admissible root and label is followed; the smallest residual wins, then the pixel range.

It follows models that are a plain chain of Conv2d (zero padding, one group, any stride, dilation
and bias), Linear, invertible activation modules (LeakyReLU, Tanh, Sigmoid, ELU, Softplus,
Identity), flattening, and dropout in eval mode. ReLU, pooling and normalisation in front of the
start cannot be undone and are refused.

Departures:
    * The logistic root comes in closed form instead of 30,000 Adam steps.
    * Padded positions are left out of the unknown, which equals the paper's padding constraints.
    * Directions that the gradient alone determines well are solved by it alone; a consistent
      system has the same solution, and the remaining one is several times smaller.
    * The released code averages G[j] / k[j] over rows; that lets tiny k[j] dominate (step 2 does
      not). It knows one logit only; the biased head is that of the port in the breaching
      framework; starting before the head where a bias allows it, and the root for a softmax
      without bias, are ours.
    * The released code takes the label as known and flips it against the prediction to make the
      root unique, and turns batches into mixtures. Both are left out: a batch is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import least_squares, readout
from leakatlas.blocks.labels import require_plain
from leakatlas.blocks.observed import mean_gradient
from leakatlas.blocks.surgery import Link, chain
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import View, task_loss
from leakatlas.fl.losses import BCE
from leakatlas.models.structure import example_input
from leakatlas.params import Positive
from leakatlas.threat import Knowledge

LOWEST_PRODUCT = -0.27846454276107
"""Minimum of -mu / (1 + e^mu), at mu = 1.2785; no smaller <G, W> comes from a logistic loss."""


@attack("rgap", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class RGAP(Attack):
    """Recursive closed-form inversion of one example.

    Args:
        tolerance: Singular values below this share of a layer's largest count as lost directions.
        largest_residual: Relative residual of any layer above which the result is called failed.
    """

    tolerance: Positive = 1e-6
    largest_residual: Positive = 1e-3

    def outlook(self, view: View) -> Outlook:
        """One example, a gradient, and a chain of layers that can be undone."""
        if view.num_examples != 1:
            return Outlook(
                "hopeless", f"it inverts one example; the update holds {view.num_examples}"
            )
        if view.has("protocol") and view.protocol.steps(1) > 1:
            return Outlook("hopeless", "several local steps do not give one gradient")
        _require_loss(view)
        model = view.model.double()
        layers = affine_layers(model, example_input(model, view.input_shape))
        start_layer(layers)
        return Outlook(
            "applicable", "every layer can be undone; exact where its constraints have full rank"
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The recursion, for every hypothesis that is still consistent."""
        del generator
        shape = tuple(view.input_shape)
        if view.num_examples != 1:
            return nothing_found(
                shape, f"R-GAP inverts one example; the update holds {view.num_examples}."
            )
        _require_loss(view)
        update = view.update
        like = next(iter(update.tensors.values()))
        g = {name: tensor.double() for name, tensor in mean_gradient(view).items()}
        model = view.model.double()
        layers = affine_layers(model, example_input(model, shape))
        weights = {name: p.detach() for name, p in model.named_parameters()}
        first = start_layer(layers)
        hypotheses = start(layers, first, weights, g, classes=view.classes)
        if not hypotheses:
            return nothing_found(
                shape, "the head's gradient fits no logit of its loss, or is zero; nothing to start"
            )
        lost: dict[str, float] = {}
        todo = list(reversed(range(first)))
        for index, part in zip(todo, watch.share(max(len(todo), 1)), strict=False):
            del part
            name = layers[index].link.name
            solved = [
                step_back(layers[index], layers[index + 1], h, weights, g, self.tolerance)
                for h in hypotheses
            ]
            hypotheses = most_consistent(solved)
            lost[f"rank_share/{name}"] = min(h.rank_share for h in hypotheses)
        if todo and watch.cut_short:
            return nothing_found(shape, "the time budget ended before the first layer was reached")
        best = best_hypothesis(hypotheses, view, shape)
        x_hat = best.x.reshape(1, *shape).to(like)
        reasons = [
            f"{name.removeprefix('rank_share/')} determines only {share:.1%} of its input"
            for name, share in lost.items()
            if share < 1
        ]
        if best.residual > self.largest_residual:
            reasons.append(f"the constraints contradict each other (residual {best.residual:.1e})")
        return Reconstruction(
            images=view.box.clip(x_hat),
            labels=torch.tensor([best.label]),
            confidence=torch.tensor([-best.residual]),
            notes={"residual": best.residual, **lost},
        ).or_failed("; ".join(reasons))


def _require_loss(view: View) -> None:
    """Logistic loss of one logit, or plain softmax cross-entropy of several."""
    if not (view.classes == 1 and isinstance(view.loss, BCE)):
        require_plain(view.loss, "RGAP")


# -- the model as a list of affine layers ----------------------------------------------------------


@dataclass(frozen=True)
class AffineLayer:
    """A convolution or linear layer and the activations between it and the next one."""

    link: Link
    activations: tuple[nn.Module, ...]

    @property
    def weight(self) -> str:
        """Parameter name of the weight."""
        return f"{self.link.name}.weight" if self.link.name else "weight"

    @property
    def bias(self) -> str | None:
        """Parameter name of the bias."""
        if getattr(self.link.module, "bias", None) is None:
            return None
        return f"{self.link.name}.bias" if self.link.name else "bias"


def affine_layers(model: nn.Module, example: Tensor) -> tuple[AffineLayer, ...]:
    """The model as affine layers and activations.

    Args:
        model: Any module.
        example: ``(1, C, H, W)``.

    Raises:
        UnsupportedModel: If the model is no chain, or ends in an activation.
    """
    layers: list[AffineLayer] = []
    for link in chain(model, example):
        if isinstance(link.module, nn.Conv2d | nn.Linear):
            layers.append(AffineLayer(link, ()))
        elif not isinstance(link.module, nn.Flatten | nn.Identity | nn.Dropout | nn.Dropout2d):
            if not layers:
                raise UnsupportedModel(
                    f"R-GAP cannot undo {type(link.module).__name__} ({link.name}) in front of the "
                    "first convolution or linear layer."
                )
            last = layers[-1]
            layers[-1] = replace(last, activations=(*last.activations, link.module))
    if not layers or layers[-1].activations or not isinstance(layers[-1].link.module, nn.Linear):
        raise UnsupportedModel(
            f"R-GAP starts at a linear head that gives the logits; {type(model).__name__} does "
            "not end in one."
        )
    if len({layer.link.name for layer in layers}) < len(layers):
        raise UnsupportedModel("R-GAP needs layers that are used once each; this model reuses one.")
    return tuple(layers)


def start_layer(layers: Sequence[AffineLayer]) -> int:
    """Index of the earliest linear layer with a bias, else of the head.

    Raises:
        UnsupportedModel: If a layer in front of it cannot be undone.
    """
    biased = [
        i
        for i, layer in enumerate(layers)
        if isinstance(layer.link.module, nn.Linear) and layer.bias
    ]
    first = biased[0] if biased else len(layers) - 1
    for layer in layers[:first]:
        for module in layer.activations:
            inverse_of(module)
        conv = layer.link.module
        if isinstance(conv, nn.Conv2d) and (conv.groups != 1 or conv.padding_mode != "zeros"):
            raise UnsupportedModel(
                f"R-GAP writes out convolutions with one group and zero padding; {layer.link.name} "
                f"has {conv.groups} groups and {conv.padding_mode!r} padding."
            )
    return first


def inverse_of(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``(inverse of the activation, its derivative as a function of z)``.

    Values outside the range of a bounded activation (rounding) are moved just inside.

    Raises:
        UnsupportedModel: If the module is no invertible activation.
    """
    margin = 1e-15
    match module:
        case nn.LeakyReLU() if module.negative_slope > 0:
            slope = module.negative_slope
            return (
                lambda a: torch.where(a > 0, a, a / slope),
                lambda z: torch.where(z > 0, 1.0, slope).to(z),
            )
        case nn.Tanh():
            return (
                lambda a: torch.atanh(a.clamp(-1 + margin, 1 - margin)),
                lambda z: 1 - torch.tanh(z).square(),
            )
        case nn.Sigmoid():
            return (
                lambda a: torch.logit(a.clamp(margin, 1 - margin)),
                lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
            )
        case nn.ELU():
            alpha = module.alpha
            return (
                lambda a: torch.where(a > 0, a, torch.log1p(a.clamp(min=-alpha + margin) / alpha)),
                lambda z: torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z)),
            )
        case nn.Softplus() if module.beta == 1:
            return (
                lambda a: a + torch.log(-torch.expm1(-a.clamp(min=margin))),
                torch.sigmoid,
            )
        case _:
            raise UnsupportedModel(
                f"R-GAP cannot undo {type(module).__name__}: it takes invertible activations "
                "(LeakyReLU, Tanh, Sigmoid, ELU, Softplus, Identity), no pooling and no "
                "normalisation. Use an optimisation attack on this model."
            )


# -- where the recursion starts --------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """The recursion at one layer, for one root and one label.

    Args:
        x: ``(n,)`` input of the layer.
        k: ``(m,)`` gradient at the layer's output.
        label: The class this hypothesis assumes.
        residual: Largest relative residual so far.
        rank_share: Rank over unknowns of the last system solved.
    """

    x: Tensor
    k: Tensor
    label: int
    residual: float = 0.0
    rank_share: float = 1.0


def start(
    layers: Sequence[AffineLayer],
    first: int,
    weights: Mapping[str, Tensor],
    g: Mapping[str, Tensor],
    *,
    classes: int,
) -> list[Hypothesis]:
    """Input and output gradient of the start layer, under every admissible root and label."""
    layer, head = layers[first], layers[-1]
    g_w = g[layer.weight]
    if layer.bias is not None:
        k = g[layer.bias]
        if not bool(k.abs().max() > 0):
            return []
        label = int(g[head.bias].argmin()) if head.bias is not None else -1
        if head.bias is None:
            label = int(rank_one_negative(g[head.weight]))
        if classes == 1 and head.bias is not None:
            label = int(g[head.bias] < 0)  # k = -y / (1 + e^mu) is negative for y = +1
        return [Hypothesis(readout.combined_ratio(g_w, k), k, label)]
    if not bool(g_w.abs().max() > 0):
        return []
    if classes == 1:
        product = float((g_w * weights[layer.weight]).sum())
        found = []
        for mu in logistic_roots(product):
            for y in (1, -1):
                k = g_w.new_tensor([-y / (1 + math.exp(mu))])
                found.append(Hypothesis(readout.combined_ratio(g_w, k), k, int(y > 0)))
        return found
    return [
        Hypothesis(readout.combined_ratio(g_w, k), k, label, residual)
        for k, label, residual in softmax_roots(g_w, weights[layer.weight])
    ]


def logistic_roots(product: float) -> tuple[float, ...]:
    """Every mu with ``-mu / (1 + e^mu) = product``, the smaller first.

    With v = -mu - c the equation is v e^v = c e^-c, which Lambert's W inverts.
    """
    if product < LOWEST_PRODUCT:
        return ()
    from scipy.special import lambertw  # SciPy takes a while to import

    argument = product * math.exp(-product)
    branches = (0,) if product >= 0 else (0, -1)
    return tuple(float(-product - lambertw(argument, branch).real) for branch in branches)


def softmax_roots(g_w: Tensor, weight: Tensor) -> list[tuple[Tensor, int, float]]:
    """Scales at which a rank-one head gradient agrees with the softmax that it implies.

    ``G = d x^T`` with ``d`` proportional to ``p - e_y``, which has one negative entry, at y. With
    ``q = 1 - p_y`` unknown, d and x follow, and the logits ``W x`` must give back p_y.

    Args:
        g_w: ``(K, D)`` gradient of a head without bias.
        weight: ``(K, D)``.

    Returns:
        ``(k, label, disagreement with the whole softmax)`` for every root.
    """
    u, s, vh = torch.linalg.svd(g_w, full_matrices=False)
    found = []
    from scipy.optimize import brentq  # half a second to import

    for sign in (1.0, -1.0):
        direction, features = sign * u[:, 0], sign * s[0] * vh[0]
        negative = torch.nonzero(direction < 0).flatten()
        if len(negative) != 1:
            continue
        label = int(negative[0])
        direction, features = direction / -direction[label], features * -direction[label]
        scores = weight @ features  # logits times q
        others = [j for j in range(len(scores)) if j != label]

        def mismatch(
            t: float, z: Tensor = scores, y: int = label, rest: Sequence[int] = tuple(others)
        ) -> float:
            logits = z / (1 / (1 + math.exp(-t)))
            return float(logits[y] - torch.logsumexp(logits[list(rest)], 0)) + t

        grid = np.linspace(-36.0, 36.0, 1_801)
        values = np.array([mismatch(t) for t in grid])
        for left in np.nonzero(np.sign(values[:-1]) != np.sign(values[1:]))[0]:
            t = float(brentq(mismatch, grid[left], grid[left + 1], xtol=1e-14))
            q = 1 / (1 + math.exp(-t))
            k = q * direction
            implied = torch.softmax(scores / q, 0)
            implied[label] -= 1
            found.append((k, label, float((implied - k).norm() / k.norm())))
    return found


def rank_one_negative(g_w: Tensor) -> int:
    """The label from a head without bias: the odd sign of its gradient's left factor."""
    left = torch.linalg.svd(g_w, full_matrices=False)[0][:, 0]
    negative = int((left < 0).sum())
    return int(left.argmin() if negative == 1 else left.argmax())


# -- one step of the recursion ---------------------------------------------------------------------


def step_back(
    layer: AffineLayer,
    above: AffineLayer,
    h: Hypothesis,
    weights: Mapping[str, Tensor],
    g: Mapping[str, Tensor],
    tolerance: float,
) -> Hypothesis:
    """From input and output gradient of ``above`` to those of ``layer``."""
    after = h.x
    gradient = back(above, h.k, weights)
    for module in reversed(layer.activations):
        inverse, slope = inverse_of(module)
        after = inverse(after)
        gradient = slope(after) * gradient
    z, k = after, gradient
    module, g_w = layer.link.module, g[layer.weight]
    if isinstance(module, nn.Linear):
        x = readout.combined_ratio(g_w, k)
        left = (torch.outer(k, x) - g_w).norm() / g_w.norm()
        return replace(h, x=x, k=k, residual=max(h.residual, float(left)))
    assert isinstance(module, nn.Conv2d)
    if layer.bias is not None:
        z = (z.reshape(layer.link.output_shape) - weights[layer.bias][:, None, None]).flatten()
    solved = solve_convolution(module, layer.link.input_shape, k, g_w, z, tolerance)
    return replace(
        h,
        x=solved.x.flatten(),
        k=k,
        residual=max(h.residual, solved.residual),
        rank_share=solved.rank / solved.length,
    )


def back(layer: AffineLayer, k: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """``W^T k``, ``(n,)``: the gradient at a layer's input."""
    weight, module = weights[layer.weight], layer.link.module
    if isinstance(module, nn.Linear):
        return k @ weight
    assert isinstance(module, nn.Conv2d)
    gradient: Tensor = conv2d_input(
        (1, *layer.link.input_shape),
        weight,
        k.reshape(1, *layer.link.output_shape),
        module.stride,
        _padding(module),
        module.dilation,
    )
    return gradient.flatten()


def solve_convolution(
    conv: nn.Conv2d,
    shape: tuple[int, ...],
    k: Tensor,
    g_w: Tensor,
    z: Tensor,
    tolerance: float = 1e-6,
) -> least_squares.Solution:
    """The input of a convolution from its weight gradient and its output.

    Args:
        conv: The layer; only its weight and geometry are used.
        shape: ``(C, H, W)`` of its input.
        k: Output gradient, flat.
        g_w: ``(O, C, a, b)`` weight gradient.
        z: Output without bias, flat.
        tolerance: See :func:`leakatlas.blocks.least_squares.solve`.
    """
    weight = conv.weight.detach().double()

    def apply(directions: Tensor, channel: int) -> Tensor:
        images = directions.reshape(-1, 1, *shape[1:])
        out = F.conv2d(
            images,
            weight[:, channel : channel + 1],
            stride=conv.stride,
            padding=_padding(conv),
            dilation=conv.dilation,
        )
        return out.flatten(1)

    constraints = gradient_constraints(conv, shape, k)
    right = g_w.double().permute(1, 0, 2, 3).flatten(1)  # (C, O a b)
    return least_squares.solve_shared(constraints, right, apply, z, tolerance=tolerance)


def gradient_constraints(conv: nn.Conv2d, shape: tuple[int, ...], k: Tensor) -> Tensor:
    """K of one input channel, ``(O a b, H W)``: which outputs multiply a position for each tap.

    ``G[o, c, a, b] = sum_{p, q} k[o, p, q] x[c, s p + d a - pad, s q + d b - pad]``.
    """
    height, width = shape[1:]
    out, _, taps_h, taps_w = conv.weight.shape
    rows, columns = output_size(conv, height, 0), output_size(conv, width, 1)
    k = k.reshape(out, rows, columns).double()
    matrix = k.new_zeros(out, taps_h, taps_w, height, width)
    pad = _padding(conv)
    for a in range(taps_h):
        h = torch.arange(rows) * conv.stride[0] + a * conv.dilation[0] - pad[0]
        p = torch.nonzero((h >= 0) & (h < height)).flatten()
        for b in range(taps_w):
            w = torch.arange(columns) * conv.stride[1] + b * conv.dilation[1] - pad[1]
            q = torch.nonzero((w >= 0) & (w < width)).flatten()
            matrix[:, a, b, h[p][:, None], w[q][None, :]] = k[:, p[:, None], q[None, :]]
    return matrix.reshape(out * taps_h * taps_w, height * width)


def output_size(conv: nn.Conv2d, size: int, axis: int) -> int:
    """Side of a convolution's output."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    return (size + 2 * _padding(conv)[axis] - reach) // conv.stride[axis] + 1


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(conv.padding, str):
        return (int(conv.padding[0]), int(conv.padding[1]))
    if conv.padding == "valid":
        return (0, 0)
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(r % 2 for r in reach):
        raise UnsupportedModel("R-GAP does not follow 'same' padding of an even kernel.")
    return (reach[0] // 2, reach[1] // 2)


# -- which hypothesis ------------------------------------------------------------------------------


def most_consistent(hypotheses: Sequence[Hypothesis], factor: float = 1e4) -> list[Hypothesis]:
    """Those with a residual within ``factor`` of the smallest; up to 1e-9 all count as equal."""
    limit = factor * max(min(h.residual for h in hypotheses), 1e-9)
    return [h for h in hypotheses if h.residual <= limit]


def best_hypothesis(
    hypotheses: Sequence[Hypothesis], view: View, shape: tuple[int, ...]
) -> Hypothesis:
    """The smallest residual; among residuals within rounding of it, the fewest invalid pixels."""
    close = most_consistent(hypotheses, factor=10.0)

    def outside(h: Hypothesis) -> float:
        x = h.x.reshape(1, *shape)
        return float((x - view.box.clip(x)).abs().mean())

    return min(close, key=outside)


# -- before any attack -----------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerRank:
    """How much of a layer's input its constraints determine.

    Args:
        name: Module name.
        rank: Of gradient and weight constraints together.
        length: Unknowns.
    """

    name: str
    rank: int
    length: int


def rank_analysis(
    model: nn.Module, x: Tensor, y: Tensor, *, tolerance: float = 1e-6
) -> tuple[LayerRank, ...]:
    """The rank of every layer's system for one example, from the first layer on.

    Args:
        model: A chain as R-GAP follows it; left as it was.
        x: ``(1, C, H, W)``, for example noise: the rank hardly depends on it.
        y: ``(1,)`` label; ignored for one logit, where the logistic loss at y = +1 is used.
        tolerance: See :func:`leakatlas.blocks.least_squares.solve`.

    Raises:
        UnsupportedModel: If the model cannot be followed.
    """
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    layers = affine_layers(model, x)
    outputs: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        outputs.append((inputs[0], output))

    for layer in layers:
        layer.link.module.register_forward_hook(note)
    logits = model(x)
    loss = F.softplus(-logits).mean() if logits.shape[1] == 1 else task_loss(logits, y)
    gradients = torch.autograd.grad(loss, [z for _, z in outputs])
    ranks = []
    for layer, (given, z), k in zip(layers, outputs, gradients, strict=True):
        module = layer.link.module
        length = given[0].numel()
        if isinstance(module, nn.Linear):
            ranks.append(LayerRank(layer.link.name, length if bool(k.any()) else 0, length))
            continue
        assert isinstance(module, nn.Conv2d)
        bias = 0.0 if module.bias is None else module.bias.detach()[:, None, None]
        matrix = gradient_constraints(module, layer.link.input_shape, k[0].flatten())
        flat = given[0].detach().flatten(1)
        g_w = (flat @ matrix.T).reshape(flat.shape[0], -1, *module.kernel_size)
        solved = solve_convolution(
            module,
            layer.link.input_shape,
            k[0].flatten(),
            g_w.permute(1, 0, 2, 3),
            (z[0].detach() - bias).flatten(),
            tolerance,
        )
        ranks.append(LayerRank(layer.link.name, solved.rank, length))
    return tuple(ranks)
