"""Counts as the solution of linear equations: iLRG and RLU.

Both write the identity with one mean probability a class,
``sum_k n_k P_kc - n_c = B g_c``, add ``sum_c n_c = B`` (the other K equations sum to 0 = 0) and
solve by least squares. iLRG takes ``P_k`` from class embeddings read out of the gradient itself;
RLU measures ``E[p | y = k]`` on public data, averaged along a simulated local run for FedAVG.

References:
    Ma, Sun, Cui, Li, Guan and Liu, "Instance-wise Batch Label Restoration via Gradients in
    Federated Learning", ICLR 2023.
    Chen and Vikalo, "Recovering Labels from Local Updates in Federated Learning", ICML 2024.

Departures: iLRG's released rounding, whose counts need not sum to B, is replaced by the shared
one, and a class whose bias gradient vanishes (its embedding is 0/0) takes the mean embedding's
output. RLU is the minimal form that the abstract supports (reconstructed): moments of order one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from leakatlas.blocks.labels import _checks
from leakatlas.blocks.labels.head import Head
from leakatlas.blocks.labels.moments import HeadPass, confusion, head_pass
from leakatlas.errors import InvalidInput
from leakatlas.models.structure import in_mode

TINY = 1e-8
"""Bias gradients below this divide noise by noise."""


def solve_counts(bias_grad: Tensor, by_class: Tensor, batch_size: int) -> Tensor:
    """Least-squares counts, real-valued ``(K,)``.

    Args:
        bias_grad: ``(K,)``.
        by_class: ``P_kc``, mean output c of samples of class k, ``(K, K)``.
        batch_size: B.
    """
    _checks.vector("solve_counts", "bias_grad", bias_grad)
    _checks.batch("solve_counts", batch_size)
    classes = bias_grad.numel()
    if by_class.shape != (classes, classes):
        raise InvalidInput(
            f"solve_counts: by_class must be ({classes}, {classes}), got {tuple(by_class.shape)}."
        )
    p = by_class.double()
    eye = torch.eye(classes, dtype=torch.float64, device=p.device)
    system = torch.cat([torch.ones(1, classes, dtype=p.dtype, device=p.device), p.T - eye])
    right = torch.cat([torch.ones(1, dtype=p.dtype, device=p.device), bias_grad.double()])
    solution: Tensor = torch.linalg.pinv(system) @ (batch_size * right)
    return solution


def class_embeddings(weight_grad: Tensor, bias_grad: Tensor) -> Tensor:
    """``e_c = G_c / g_c`` ``(K, D)`` float64: the mean feature that class c saw.

    Rows whose bias gradient vanishes are the mean of the others.
    """
    g = bias_grad.double()
    usable = g.abs() > TINY
    if not bool(usable.any()):
        raise InvalidInput(
            "class_embeddings: every bias gradient is 0, so the update carries no labels."
        )
    ratio = weight_grad.double() / torch.where(usable, g, torch.ones_like(g))[:, None]
    return torch.where(usable[:, None], ratio, ratio[usable].mean(dim=0))


def ilrg(
    weight_grad: Tensor, bias_grad: Tensor, weight: Tensor, bias: Tensor, batch_size: int
) -> Tensor:
    """Instance-wise batch label restoration, real-valued counts ``(K,)``.

    Args:
        weight_grad: Gradient of the head's weight ``(K, D)``.
        bias_grad: Gradient of its bias ``(K,)``.
        weight: The head's weight ``(K, D)``.
        bias: Its bias ``(K,)``.
        batch_size: B.
    """
    embedded = class_embeddings(weight_grad, bias_grad)
    by_class = (embedded @ weight.double().T + bias.double()).softmax(dim=1)
    return solve_counts(bias_grad, by_class, batch_size)


def rlu(bias_grad: Tensor, public: HeadPass | list[HeadPass], batch_size: int) -> Tensor:
    """Counts from public confusion moments, real-valued ``(K,)``.

    Args:
        bias_grad: Mean bias gradient ``(K,)``, averaged over local steps for FedAVG.
        public: Labelled public data at the global weights, or one pass a local step
            (:func:`simulated_passes`).
        batch_size: Samples behind the update.
    """
    passes = public if isinstance(public, list) else [public]
    if not passes:
        raise InvalidInput("rlu: needs at least one pass of public data, got none.")
    by_class = torch.stack([confusion(seen) for seen in passes]).mean(dim=0)
    return solve_counts(bias_grad, by_class, batch_size)


def simulated_passes(
    model: nn.Module,
    head: Head,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
) -> list[HeadPass]:
    """Public data seen at each weight of a simulated client run with plain SGD.

    Args:
        model: The global model, left as it was.
        head: Its head.
        inputs: Public inputs ``(N, ...)``.
        labels: Their labels ``(N,)``.
        steps: Local steps T; the passes are those *before* each step.
        lr: Learning rate.
        batch_size: Local batch size.
        generator: Draws the batches.
    """
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, theta, (x,)), y)

    passes: list[HeadPass] = []
    with in_mode(model, train=False):
        for _ in range(steps):
            passes.append(head_pass(model, head, inputs, labels, weights=weights))
            pick = torch.randperm(len(inputs), generator=generator)[:batch_size].to(inputs.device)
            step = grad(loss)(weights, inputs[pick], labels[pick])
            weights = {name: w - lr * step[name] for name, w in weights.items()}
    return passes


class FixedPoint(NamedTuple):
    """Counts and whether they settled: ``counts`` ``(K,)``, ``converged``, ``iterations``."""

    counts: Tensor
    converged: bool
    iterations: int


def fixed_point(
    bias_grad: Tensor, by_class: Tensor, batch_size: int, *, iterations: int = 200
) -> FixedPoint:
    """Iterate counts -> mean probability -> counts, kept in the simplex at every turn.

    For trained models, whose mean probability depends on the labels sought. Unlike
    :func:`solve_counts` no iterate leaves [0, B].

    Args:
        bias_grad: ``(K,)``.
        by_class: ``E[p | y = k]`` ``(K, K)``.
        batch_size: B.
        iterations: Give up after this many.
    """
    _checks.batch("fixed_point", batch_size)
    g, p = bias_grad.double(), by_class.double()
    counts = torch.full_like(g, batch_size / len(g))
    for turn in range(1, iterations + 1):
        proposed = (counts @ p - batch_size * g).clamp(0, batch_size)
        total = float(proposed.sum())
        proposed = proposed * (batch_size / total) if total > 0 else counts
        moved, counts = float((proposed - counts).abs().max()), proposed
        if moved < 1e-9 * batch_size:
            return FixedPoint(counts, True, turn)
    return FixedPoint(counts, False, iterations)
