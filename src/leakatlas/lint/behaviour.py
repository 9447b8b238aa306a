"""Checks on the client's own batch, D8 to D11 (and the saturation part of D7).

Per-example gradients come from ``torch.func``, reduced to norms inside the map, so that nothing of
the size of (examples x weights) is kept. They are taken in eval mode: in train mode a batch
normalisation mixes examples, and there is no gradient of one of them.

Where ``s w`` stands in one layer and ``w' / s`` in the next, their gradients are ``g / s`` and
``s g'``. Norms are taken in float64, which holds what float32 cannot square; every statistic
compares gradients of one tensor, or weighs a tensor's gradient with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakatlas.errors import InvalidInput
from leakatlas.fl import replay, task_loss
from leakatlas.fl.state import buffers, parameters, trained
from leakatlas.lint.findings import Score, share_of
from leakatlas.models.sizes import REFUSALS
from leakatlas.models.structure import in_mode

EXAMPLES = 64
"""Per-example gradients are taken of at most so many examples, the first ones."""

FEWEST = 4
"""A share among fewer examples says nothing."""

FIRING = 1e-5
"""An example excites a row if its gradient there exceeds this share of the layer's largest."""


@dataclass(frozen=True)
class Batch:
    """The client's own examples.

    Args:
        x: ``(N, C, H, W)``, model space.
        y: ``(N,)`` labels or ``(N, K)`` probabilities.
    """

    x: Tensor
    y: Tensor


# -- what the checks share -------------------------------------------------------------------------


def row_norms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Norm of every row of every example's gradient, ``(N, m)`` in float64 by weight name.

    Weights with one dimension (biases, norms) are left out.
    """
    x, y = batch.x[:EXAMPLES], batch.y[:EXAMPLES]
    own = parameters(model)
    weights = {name: p for name, p in own.items() if p.dim() > 1}
    fixed = {name: p for name, p in own.items() if p.dim() <= 1} | buffers(model)

    def loss(leaves: Mapping[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, {**fixed, **leaves}, (one[None],))
        return task_loss(logits, target[None])

    def rows(one: Tensor, target: Tensor) -> dict[str, Tensor]:
        found = grad(loss)(weights, one, target)
        return {n: g.flatten(1).double().norm(dim=1) for n, g in found.items()}

    # Attention's fused kernels cannot be mapped, and torch warns about every one.
    with in_mode(model, train=False), sdpa_kernel(SDPBackend.MATH):
        try:
            found: dict[str, Tensor] = vmap(rows, chunk_size=8)(x, y)
        except RuntimeError:
            # Control flow on values and a few operators cannot be mapped; they can be looped.
            alone = [rows(one, target) for one, target in zip(x, y, strict=True)]
            found = {name: torch.stack([part[name] for part in alone]) for name in weights}
    return found


def batch_gradient(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradient of the mean loss over the whole batch, in the model's own mode."""
    return replay.gradient(
        model, trained(model), buffers(model), batch.x, batch.y, create_graph=False
    )


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Logits ``(N, K)`` in eval mode; the mode is restored.

    Raises:
        InvalidInput: If the model cannot read the batch, or gives no finite logits.
    """
    try:
        with in_mode(model, train=False):
            logits = model(x)
    except REFUSALS as problem:
        # Shapes are checked anywhere inside the model, and its code may be anybody's.
        raise InvalidInput(
            f"{type(model).__name__} cannot read the batch of shape {tuple(x.shape)}: "
            f"{type(problem).__name__}: {str(problem)[:500]}"
        ) from problem
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidInput(f"{type(model).__name__} must return logits (N, K); got {got}.")
    if not bool(torch.isfinite(logits).all()):
        raise InvalidInput(
            f"{type(model).__name__} gives logits that are not finite on the batch; do not train "
            "on it."
        )
    return logits


# -- the checks ------------------------------------------------------------------------------------


def d7_saturation(logits: Tensor, y: Tensor) -> list[Score]:
    """D7, with data: how sure the wrong predictions are.

    The mean over the batch of the largest probability where the prediction is wrong, 0 where it is
    right. An untrained model is unsure, a trained one mostly right.

    Args:
        logits: ``(N, K)``.
        y: ``(N,)`` or ``(N, K)``.
    """
    if len(logits) < FEWEST:
        return []
    sure, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = predicted != (y if y.dim() == 1 else y.argmax(dim=1))
    value = float(torch.where(wrong, sure, torch.zeros_like(sure)).mean())
    words = f"{int(wrong.sum())} of {len(logits)} predictions are wrong, surely so ({value:.0%})"
    return [Score("D7/saturation", "", value, words)]


def d8_d_snr(norms: Mapping[str, Tensor]) -> list[Score]:
    """D8: D-SNR, ``max_i |g_i| / sum_{j != i} |g_j|`` over per-example gradients.

    The largest over all convolution and linear weights; the score is D-SNR / (1 + D-SNR), the
    share of the largest norm.

    Args:
        norms: From :func:`row_norms`.
    """
    shares = {}
    for name, rows in norms.items():
        size = rows.norm(dim=1)
        if len(size) >= FEWEST and bool(size.max() > 0):
            shares[name] = float(size.max() / size.sum())
    if not shares:
        return []
    worst = max(shares, key=lambda name: shares[name])
    share = shares[worst]
    snr = share / (1 - share) if share < 1 else math.inf
    words = f"one example rules the gradient, D-SNR {snr:.3g}"
    return [Score("D8/d_snr", _module(worst), share, words)]


def d9_activations(norms: Mapping[str, Tensor], linear: frozenset[str]) -> list[Score]:
    """D9: of the rows that any example excites, the share that exactly one excites.

    "Excites" means a non-zero gradient, which covers any activation: above zero for a ReLU, inside
    the band for a hard tanh.

    Args:
        norms: From :func:`row_norms`.
        linear: Names of the linear layers' weights, but for the head.
    """
    scores = []
    for name, rows in norms.items():
        if name not in linear or len(rows) < 2 * FEWEST or not bool(rows.max() > 0):
            continue
        fires = (rows > FIRING * rows.max()).sum(dim=0)
        active, alone = int((fires > 0).sum()), int((fires == 1).sum())
        everyone = int((fires == len(rows)).sum())
        scores.append(
            Score(
                "D9/alone",
                _module(name),
                alone / active,
                f"{alone} of {active} active neurons answer to one example alone "
                f"({rows.shape[1] - active} to none, {everyone} to all)",
            )
        )
    return scores


def d10_gradient_sparsity(gradient: Mapping[str, Tensor]) -> list[Score]:
    """D10: zero rows, runs of zero columns, top row and effective rank of a layer's gradient.

    Args:
        gradient: Linear layers' weights by name, ``(m, n)``.
    """
    scores = []
    for name, g in gradient.items():
        if g.dim() != 2 or min(g.shape) < 2 * FEWEST or not bool(g.abs().max() > 0):
            continue
        place = _module(name)
        energy = g.double().square()
        energy = energy / energy.sum()
        rows, columns = energy.sum(dim=1), energy.sum(dim=0)
        empty = float((rows == 0).double().mean())
        run = _longest_run(columns == 0) / g.shape[1]
        top = float(rows.max())
        rank = effective_rank(g)
        scores += [
            Score("D10/zero_rows", place, empty, f"{empty:.0%} of the gradient's rows are zero"),
            Score(
                "D10/zero_columns",
                place,
                run,
                f"{run:.0%} of the gradient's columns are one block of zeros",
            ),
            Score("D10/top_row", place, top, f"one row has {top:.0%} of the gradient's energy"),
            Score("D10/rank", place, 1 / rank, f"effective rank of the gradient {rank:.2f}"),
        ]
    return scores


def effective_rank(g: Tensor) -> float:
    """``exp`` of the entropy of the normalised squared singular values of ``(m, n)``."""
    g = g.double() / g.abs().max()
    gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    if len(gram) > 1024:  # the energy beyond a thousand rows does not change the picture
        keep = gram.diagonal().topk(1024).indices
        gram = gram[keep][:, keep]
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    values = values / values.sum()
    values = values[values > 0]
    return max(math.exp(-float((values * values.log()).sum())), 1.0)


def d11_dynamics(
    logits: Tensor,
    before: Tensor,
    y: Tensor,
    size: float,
    size_before: float,
) -> list[Score]:
    """D11: loss and gradient against the previous round's model, on the same batch.

    The loss counts as far as it exceeds both the previous one and chance, in nats, as
    ``d / (1 + d)``; the gradient as ``log r / (1 + log r)`` of the growth r of its size.

    Args:
        logits: ``(N, K)`` of the received model.
        before: ``(N, K)`` of the previous one.
        y: Labels.
        size: :func:`relative_size` of the received model's gradient.
        size_before: Of the previous one's.
    """
    loss, earlier = float(task_loss(logits, y)), float(task_loss(before, y))
    excess = max(loss - max(earlier, math.log(logits.shape[1])), 0.0)
    scores = [
        Score(
            "D11/loss",
            "",
            share_of(excess),
            f"loss {loss:.3g} on the own batch, after {earlier:.3g} with the previous model",
        )
    ]
    if size_before > 0:  # a head that starts at zero gives no size to compare with
        growth = size / size_before
        jump = max(math.log(growth), 0.0) if growth > 0 else growth  # NaN stays NaN
        scores.append(
            Score(
                "D11/gradient",
                "",
                share_of(jump),
                f"gradient {growth:.3g} times the previous model's, in units of the weights",
            )
        )
    return scores


def relative_size(gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    r""":math:`\sqrt{\sum_l |w_l|^2 |g_l|^2}` over all tensors: no rescaling of layers changes it.

    Args:
        gradient: By parameter name.
        weights: Likewise; may hold more.
    """
    total = 0.0
    for name, g in gradient.items():
        total += float(g.double().norm() * weights[name].detach().double().norm()) ** 2
    return math.sqrt(total)


def _longest_run(flags: Tensor) -> int:
    longest = run = 0
    for flag in flags.tolist():
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")
