"""What an unrolled client keeps in memory, known before it is unrolled.

Of every local step a replay keeps either its whole graph, which a derivative through the step
needs, or only the weights and the optimizer's memory it began with (:func:`.replay.unroll`). The
graph's size is measured on one step, not estimated from the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from leakatlas import limits
from leakatlas.fl import replay, state
from leakatlas.fl.protocol import FedAVG

_KNOWN: dict[tuple[object, ...], int] = {}
"""Bytes of a step's graph by what it depends on, so that every case is measured once."""

WAY_OUT = (
    "Lower the protocol's epochs or raise its batch_size, leave out the attacks that replay the "
    "client, or use a machine with more memory."
)


def require_room(
    model: nn.Module, protocol: FedAVG, examples: int, input_shape: tuple[int, ...]
) -> None:
    """Refuse a replay of local steps that this machine's memory cannot hold.

    Args:
        model: In the client's mode.
        protocol: Its local steps.
        examples: N.
        input_shape: ``(C, H, W)``.

    Raises:
        InvalidParameter: With the arithmetic.
    """
    steps = protocol.steps(examples)
    graph = graph_bytes(model, (min(protocol.batch_size, examples), *input_shape))
    needed, arithmetic = arithmetic_of(model, protocol, steps, graph)
    limits.require_memory(
        f"The replay of {steps:,} local steps", needed, arithmetic, way_out=WAY_OUT
    )


def arithmetic_of(model: nn.Module, protocol: FedAVG, steps: int, graph: int) -> tuple[int, str]:
    """Bytes of ``steps`` unrolled local steps, and how they come about.

    Args:
        model: What is trained.
        protocol: Its optimizer.
        steps: T.
        graph: Bytes of one step's graph.
    """
    weights = sum(p.numel() * p.element_size() for p in state.trained(model).values())
    copies = 1 + replay.slots(protocol)
    kept = 1 if steps >= replay.CHECKPOINT_FROM else steps
    words = f"{steps:,} steps x {limits.size(weights)} of weights x {copies}"
    more = "the graph of one step" if kept == 1 else f"{kept} graphs of a step"
    return (
        steps * copies * weights + kept * graph,
        f"{words} + {more} of {limits.size(graph)}",
    )


def graph_bytes(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that one differentiable local step keeps, besides the weights themselves.

    Args:
        model: In the client's mode; not changed.
        shape: Of the step's batch, ``(B, C, H, W)``.
    """
    parameters = {name: p.detach() for name, p in state.trained(model).items()}
    case = (
        type(model).__qualname__, model.training, shape,
        tuple((n, tuple(p.shape), p.dtype) for n, p in model.named_parameters()),
    )  # fmt: skip
    if case not in _KNOWN:
        _KNOWN[case] = _measured(model, parameters, shape)
    return _KNOWN[case]


def _measured(model: nn.Module, parameters: Mapping[str, Tensor], shape: tuple[int, ...]) -> int:
    like = next(iter(parameters.values()))
    x = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, *state.held(model).values())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.random.fork_rng(devices=[]),
        saved_tensors_hooks(note, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        # The loss itself keeps next to nothing; this one fits every kind of target.
        found = replay.gradient(
            model, parameters, dict(model.named_buffers()), x, torch.empty(0),
            loss=lambda logits, y: logits.square().sum(), how="autograd",
        )  # fmt: skip
        del found  # alive until here: a storage that is freed may lend its address to another
    return sum(kept.values())
