"""A client's local work, done with real modules and real optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from leakatlas.data import Box
from leakatlas.errors import InvalidInput
from leakatlas.fl import draws, state
from leakatlas.fl.augmentation import augmented
from leakatlas.fl.hooks import ClientContext, Defense, LocalStep
from leakatlas.fl.losses import Loss
from leakatlas.fl.protocol import FedAVG, FedSGD
from leakatlas.fl.seeding import stream_seed
from leakatlas.models.structure import in_mode


@dataclass(frozen=True)
class LocalResult:
    """What local training produced, before any update hook.

    Args:
        tensors: Mean (or summed) gradient, or ``after - before``, of the trained parameters.
        buffers_after: All buffers after training.
        order: Example indices of every local step.
        draws: What the model drew in every local step (dropout masks); empty tuples if nothing.
        augmentation: The seed of every local step's transforms; empty if there are none.
        loss: Task loss of the first local step.
    """

    tensors: dict[str, Tensor]
    buffers_after: dict[str, Tensor]
    order: tuple[Tensor, ...]
    draws: tuple[draws.Draws, ...]
    augmentation: tuple[int, ...]
    loss: float


def plain_gradients(step: LocalStep) -> dict[str, Tensor]:
    """The undefended step: the gradient of the loss, zeros where a parameter takes no part.

    Parameters that take no gradient are constants, and have none.
    """
    named = state.trained(step.model)
    loss = step.loss(step.model(step.x), step.y)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


def local_batches(
    examples: int, protocol: FedSGD | FedAVG, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Indices of every local step: all at once for FedSGD, epochs of batches for FedAVG."""
    if isinstance(protocol, FedSGD):
        return (torch.arange(examples),)
    batches: list[Tensor] = []
    for _ in range(protocol.epochs):
        order = (
            torch.randperm(examples, generator=generator)
            if protocol.shuffle
            else torch.arange(examples)
        )
        batches.extend(order.split(protocol.batch_size))
    return tuple(batches)


def check_batches(
    model: nn.Module, x: Tensor, protocol: FedSGD | FedAVG, who: str = "The client"
) -> None:
    """Refuse, before anything runs, batches that a normalisation in train mode cannot take.

    Batch statistics need two values per channel: two examples, or more than one place.

    Raises:
        InvalidInput: With layer, batch size and the ways out.
    """
    if protocol.mode != "train":
        return
    # Every epoch deals batches of the same sizes, and there may be a billion epochs.
    once = protocol if isinstance(protocol, FedSGD) else replace(protocol, epochs=1)
    order = local_batches(len(x), once, torch.Generator().manual_seed(0))
    smallest = min(len(batch) for batch in order)
    if smallest > 1 and not any(isinstance(m, _InstanceNorm) for m in model.modules()):
        return
    places: dict[str, int] = {}
    names = {id(m): n for n, m in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        places[names[id(module)]] = int(inputs[0][0, 0].numel())

    kinds = (_BatchNorm, _InstanceNorm)
    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        with in_mode(model, train=False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros_like(x[:1]))
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(model.named_modules())
    for name, count in places.items():
        alone = 1 if isinstance(modules[name], _InstanceNorm) else smallest
        if alone * count > 1:
            continue
        sizes = [len(batch) for batch in order]
        last = (
            f"batch {sizes.index(smallest) + 1} of {len(x)} examples holds one"
            if len(sizes) > 1
            else "its batch holds one example"
        )
        ways = ["mode='eval'", "GroupNorm instead"]
        if isinstance(protocol, FedAVG) and len(x) > 1:
            fits = [b for b in range(2, len(x) + 1) if len(x) % b != 1]
            near = sorted(fits, key=lambda b: abs(b - protocol.batch_size))[:2]
            ways.insert(0, "batch_size=" + " or ".join(map(str, sorted(near))))
        else:
            ways.insert(0, "two examples or more")
        raise InvalidInput(
            f"{who}: {type(modules[name]).__name__} {name!r} in train mode has one value per "
            f"channel where {last} (batch size {max(sizes)}), so its statistics "
            f"are undefined; use {', '.join(ways[:-1])}, or {ways[-1]}."
        )


def train_locally(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    protocol: FedSGD | FedAVG,
    *,
    defenses: Sequence[Defense] = (),
    contexts: Sequence[ClientContext] = (),
    generator: torch.Generator,
    box: Box | None = None,
) -> LocalResult:
    """Run one client's round on ``model``, which is changed in place.

    Args:
        model: A copy of the received model, owned by this call.
        x: All examples of the client, model space ``(N, C, H, W)``.
        y: Targets of the protocol's loss: ``(N,)`` or ``(N, K)``.
        protocol: The learning algorithm.
        defenses: In client order; each acts at its ``batch`` and ``local_step`` hooks.
        contexts: One for each defense.
        generator: Order of the examples, their transforms, and the model's own randomness
            (dropout, sampling).
        box: Between pixels, on which transforms act, and model space; none if None.
    """
    model.train(protocol.mode == "train")
    reduction = protocol.reduction if isinstance(protocol, FedSGD) else "mean"
    objective: Loss = protocol.loss
    loss = functools.partial(objective, reduction=reduction)
    before = {name: p.detach().clone() for name, p in state.trained(model).items()}
    order = local_batches(len(x), protocol, generator)
    gradients = _chain(defenses, contexts)
    optimizer = _optimizer(model, protocol)
    tensors: dict[str, Tensor] = {}
    drawn: list[draws.Draws] = []
    seeds: list[int] = []
    first_loss = float("nan")
    with torch.random.fork_rng(devices=[]):
        # Modules with their own randomness draw from the global generator.
        torch.manual_seed(stream_seed(int(torch.randint(2**62, (1,), generator=generator))))
        for index, batch in enumerate(order):
            x_step, y_step = x[batch], y[batch]
            if protocol.augment:
                seeds.append(int(torch.randint(2**62, (1,), generator=generator)))
                x_step = augmented(x_step, protocol.augment, seeds[-1], box)
            for defense, context in zip(defenses, contexts, strict=True):
                context.model, context.box = model, box
                x_step, y_step = defense.batch(x_step, y_step, context)
                context.x, context.y = x_step, y_step
            observed: list[float] = []

            def watched(logits: Tensor, target: Tensor, record: list[float] = observed) -> Tensor:
                value = loss(logits, target)
                record.append(float(value.detach()))
                return value

            context = contexts[-1] if contexts else _no_context(model, x, y, protocol, generator)
            step = LocalStep(model, x_step, y_step, watched, index, context)
            with draws.recorded() as found:
                tensors = gradients(step)
            drawn.append(tuple(found))
            if index == 0 and observed:
                first_loss = observed[0]
            if optimizer is not None:
                for name, parameter in state.trained(model).items():
                    parameter.grad = tensors[name].detach().clone()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    if optimizer is not None:
        after = state.trained(model)
        tensors = {name: after[name].detach() - before[name] for name in before}
    return LocalResult(
        {name: tensor.detach() for name, tensor in tensors.items()},
        state.buffers(model),
        order,
        tuple(drawn),
        tuple(seeds),
        first_loss,
    )


def _chain(
    defenses: Sequence[Defense], contexts: Sequence[ClientContext]
) -> Callable[[LocalStep], dict[str, Tensor]]:
    """The step with every defense wrapped around it, the first one outermost."""
    call: Callable[[LocalStep], dict[str, Tensor]] = plain_gradients
    for defense, context in reversed(list(zip(defenses, contexts, strict=True))):
        call = _wrapped(defense, context, call)
    return call


def _wrapped(
    defense: Defense, context: ClientContext, inner: Callable[[LocalStep], dict[str, Tensor]]
) -> Callable[[LocalStep], dict[str, Tensor]]:
    def call(step: LocalStep) -> dict[str, Tensor]:
        step.context = context
        return defense.local_step(step, inner)

    return call


def _optimizer(model: nn.Module, protocol: FedSGD | FedAVG) -> torch.optim.Optimizer | None:
    if isinstance(protocol, FedSGD):
        return None
    if protocol.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(),
            lr=protocol.lr,
            betas=protocol.betas,
            weight_decay=protocol.weight_decay,
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=protocol.lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )


def _no_context(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    protocol: FedSGD | FedAVG,
    generator: torch.Generator,
) -> ClientContext:
    return ClientContext(-1, -1, model, x, y, protocol, generator, {})
