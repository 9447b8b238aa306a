"""What a client's buffers of batch normalisation say, before and after its local steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leakatlas.errors import UnsupportedModel
from leakatlas.fl import Update
from leakatlas.models.structure import batchnorm_layers, example_input, hooked, in_mode


@dataclass(frozen=True)
class Solved:
    """What the buffers give away.

    Args:
        statistics: Mean and biased variance by layer name, weighted over the local steps.
        steps: Local steps k, by the counter if it was sent.
        momentum: m, the same in all layers.
    """

    statistics: Mapping[str, tuple[Tensor, Tensor]]
    steps: int
    momentum: float


def client_statistics(
    update: Update, model: nn.Module, shape: tuple[int, ...], batch: int, steps: int
) -> Solved:
    """The client's batch statistics, from its buffers before and after.

    Of a mean over clients, the mean of their batch statistics.

    Args:
        update: With both buffers.
        model: A copy that the caller owns.
        shape: ``(C, H, W)``.
        batch: Examples of a local batch, for the correction of variances.
        steps: Local steps of the protocol, for where the counters are not sent and the statistics
            are: in a secure sum, which masks what is no whole number.

    Raises:
        UnsupportedModel: If the client sends no buffers, or they did not move, or the layers keep
            none or average in another way.
    """
    before, after = update.buffers_before, update.buffers_after
    values = values_per_example(model, shape)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    known: set[tuple[int, float]] = set()
    for name, layer in batchnorm_layers(model).items():
        assert isinstance(layer, _BatchNorm)
        keys = [f"{name}.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")]
        if any(key not in before or key not in after for key in keys):
            raise UnsupportedModel(
                f"The client keeps the buffers of {name!r} to itself, so its batch statistics "
                "cannot be solved; matching the update alone is Inverting Gradients."
            )
        if layer.momentum is None:
            raise UnsupportedModel(f"{name!r} averages over all batches, not with a momentum.")
        counted = int(after[keys[2]] - before[keys[2]])
        if counted < 1 and all(torch.equal(after[key], before[key]) for key in keys[:2]):
            raise UnsupportedModel(
                f"The statistics of {name!r} did not move: the client trained it in eval mode."
            )
        taken = counted if counted > 0 else steps
        known.add((taken, float(layer.momentum)))
        kept = (1 - layer.momentum) ** taken
        mean, variance = (
            (after[key].double() - kept * before[key].double()) / (1 - kept) for key in keys[:2]
        )
        n = batch * values[name]
        found[name] = (mean.to(after[keys[0]]), (variance * (n - 1) / n).to(after[keys[1]]))
    if len(known) != 1:
        raise UnsupportedModel("The normalisation layers differ in momentum or in batches seen.")
    taken, momentum = known.pop()
    return Solved(found, taken, momentum)


def step_weights(solved: Solved, batches: int) -> list[float]:
    """Share of every batch of an epoch in the solved statistics; they sum to 1.

    Args:
        solved: With k steps, whole epochs of the same batches in the same order.
        batches: Batches of an epoch.
    """
    weights = [0.0] * batches
    for step in range(solved.steps):
        weights[step % batches] += (1 - solved.momentum) ** (solved.steps - 1 - step)
    total = sum(weights)
    return [weight / total for weight in weights]


def values_per_example(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """How many values of a channel every normalisation layer sees of one example, by name."""
    layers = batchnorm_layers(model)
    names = {layer: name for name, layer in layers.items()}
    found: dict[str, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        found[names[module]] = inputs[0][0, 0].numel()

    with in_mode(model, train=False), hooked(layers.values(), note), torch.no_grad():
        model(example_input(model, shape))
    return found
