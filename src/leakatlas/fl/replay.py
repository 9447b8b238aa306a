"""The adversary's differentiable re-run of a client: one gradient, or the unrolled local steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakatlas.fl.protocol import FedAVG, FedSGD, task_loss

Loss = Callable[[Tensor, Tensor], Tensor]
BatchMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def gradient(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = task_loss,
    create_graph: bool = True,
) -> dict[str, Tensor]:
    """Loss gradient at ``parameters``, differentiable in ``x`` and ``y``.

    A pure function: ``model`` gives only the architecture and its mode, and buffers are copied,
    so BN in train mode leaves no trace.

    Args:
        model: The architecture.
        parameters: By name; need not require gradients.
        buffers: By name.
        x: ``(N, C, H, W)``, model space.
        y: ``(N,)`` labels or ``(N, K)`` probabilities.
        loss: ``(logits, y) -> scalar``.
        create_graph: Whether the result can be differentiated again.
    """
    leaves = {
        name: p if p.requires_grad else p.detach().requires_grad_()
        for name, p in parameters.items()
    }
    state = {**leaves, **{name: b.clone() for name, b in buffers.items()}}
    value = loss(functional_call(model, state, (x,)), y)
    gradients = torch.autograd.grad(
        value, list(leaves.values()), create_graph=create_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(leaves.items(), gradients, strict=True)
    }


def unroll(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    protocol: FedAVG,
    *,
    batches: Sequence[Tensor] | None = None,
    loss: Loss = task_loss,
    batch_map: BatchMap | None = None,
) -> dict[str, Tensor]:
    """``after - before`` of FedAVG's local training, differentiable in ``x`` and ``y``.

    Follows SGD with momentum and weight decay, or Adam, step by step. BN running statistics do
    not enter a train-mode forward pass and stay fixed in eval mode, so they are not unrolled.

    Args:
        model: The architecture.
        parameters: Weights before training, by name.
        buffers: By name.
        x: ``(N, C, H, W)``, model space.
        y: ``(N,)`` labels or ``(N, K)`` probabilities.
        protocol: The local hyperparameters.
        batches: Example indices of every step; in the given order, epoch by epoch, if None.
        loss: ``(logits, y) -> scalar``.
        batch_map: What the client does to a batch before the step.
    """
    if batches is None:
        epoch = torch.arange(len(x)).split(protocol.batch_size)
        batches = [batch for _ in range(protocol.epochs) for batch in epoch]
    start = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    current: dict[str, Tensor] = dict(start)
    velocity: dict[str, Tensor] = {}
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for t, batch in enumerate(batches, start=1):
        x_step, y_step = x[batch], y[batch]
        if batch_map is not None:
            x_step, y_step = batch_map(x_step, y_step)
        step = gradient(model, current, buffers, x_step, y_step, loss=loss)
        if protocol.weight_decay:
            step = {name: g + protocol.weight_decay * current[name] for name, g in step.items()}
        if protocol.optimizer == "adam":
            step = _adam(step, moments, t, protocol.betas)
        elif protocol.momentum:
            velocity = {
                name: protocol.momentum * velocity[name] + g if velocity else g
                for name, g in step.items()
            }
            step = velocity
        current = {name: p - protocol.lr * step[name] for name, p in current.items()}
    return {name: current[name] - start[name] for name in start}


def _adam(
    gradients: Mapping[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    t: int,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
) -> dict[str, Tensor]:
    """Adam's direction at step ``t`` (from 1), updating ``moments``."""
    steps: dict[str, Tensor] = {}
    for name, g in gradients.items():
        zero = torch.zeros_like(g)
        m, v = moments.get(name, (zero, zero))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g.square()
        moments[name] = (m, v)
        v_hat = v / (1 - betas[1] ** t)
        # sqrt has an infinite slope at 0; dead units are exactly there.
        alive = v_hat > 0
        root = torch.where(alive, torch.where(alive, v_hat, torch.ones_like(v_hat)).sqrt(), zero)
        steps[name] = m / (1 - betas[0] ** t) / (root + epsilon)
    return steps


def simulate_client(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    protocol: FedSGD | FedAVG,
    *,
    batches: Sequence[Tensor] | None = None,
    loss: Loss | None = None,
    batch_map: BatchMap | None = None,
) -> dict[str, Tensor]:
    """The client's quantity (gradient or delta) for candidates ``x, y``; see the two above."""
    if isinstance(protocol, FedAVG):
        return unroll(
            model, parameters, buffers, x, y, protocol,
            batches=batches, loss=loss or task_loss, batch_map=batch_map,
        )  # fmt: skip
    if batch_map is not None:
        x, y = batch_map(x, y)

    def reduced(logits: Tensor, target: Tensor) -> Tensor:
        return task_loss(logits, target, protocol.reduction)

    return gradient(model, parameters, buffers, x, y, loss=loss or reduced)
