"""The adversary's differentiable re-run of a client: one gradient, or the unrolled local steps."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from leakatlas.errors import InvalidInput
from leakatlas.fl import draws as randomness
from leakatlas.fl import state
from leakatlas.fl.draws import Draws
from leakatlas.fl.hooks import Defense
from leakatlas.fl.protocol import FedAVG, FedSGD, task_loss
from leakatlas.fl.update import Update

Loss = Callable[[Tensor, Tensor], Tensor]
Drawn = Draws | Literal["mean", "new"]
"""What a forward pass draws: these draws, their expectation, or new ones every time."""
BatchMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Augment = Callable[[Tensor, int], Tensor]
"""``(images of a local step, its index) -> images``."""
Derivative = Literal["autograd", "functional", "finite"]
"""How a replayed gradient can be differentiated again: by the tape, by ``torch.func`` (the form
that ``vmap`` and tracing take), or by central differences (biased; a single gradient only)."""

CHECKPOINT_FROM = 20
"""Local steps from which :func:`unroll` forgets its graph: 50 steps of ResNet-8 keep gigabytes."""

NOTHING: Mapping[str, Tensor] = MappingProxyType({})

_HOW: ContextVar[Derivative] = ContextVar("derivative", default="autograd")
_RECORD: ContextVar[set[object] | None] = ContextVar("record", default=None)


@contextmanager
def derivative(how: Derivative) -> Iterator[None]:
    """Within the block, replays are differentiable in this way."""
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


@contextmanager
def recorded(record: set[object]) -> Iterator[None]:
    """Within the block, add a signature of every replayed model to ``record``.

    Two replays of equal signature cost the same: same class, mode, parameter and input shapes.
    """
    token = _RECORD.set(record)
    try:
        yield
    finally:
        _RECORD.reset(token)


def gradient(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    loss: Loss = task_loss,
    create_graph: bool = True,
    how: Derivative | None = None,
    own: bool = False,
    drawn: Drawn = "mean",
) -> dict[str, Tensor]:
    """Loss gradient at ``parameters``, differentiable in ``x``, ``y`` and ``parameters``.

    A pure function: ``model`` gives only the architecture, its mode and its constants, and
    buffers are copied, so BN in train mode leaves no trace. Attention runs under torch's math
    backend, the only one that can be differentiated twice.

    Args:
        model: The architecture.
        parameters: Those whose gradient is wanted, by name; need not require gradients. The
            others stay at the model's own values.
        buffers: By name.
        x: ``(N, C, H, W)``, model space.
        y: Targets of the loss, such as ``(N,)`` labels or ``(N, K)`` probabilities.
        loss: ``(logits, y) -> scalar``.
        create_graph: Whether the result can be differentiated again.
        how: By which means; that of the enclosing :func:`derivative` if None.
        own: Whether ``parameters`` and ``buffers`` are the model's own, which is then called as it
            is: what ``functional_call`` costs shows in small networks. The model must be one that
            :func:`without_running_statistics` returned.
        drawn: What the forward pass draws (dropout masks); the mean network by default.

    Raises:
        InvalidInput: If slopes through ``parameters`` are asked of finite differences.
    """
    held = {} if own else {name: b.clone() for name, b in buffers.items()}
    record = _RECORD.get()
    if record is not None:
        shapes = tuple((name, tuple(p.shape)) for name, p in parameters.items())
        record.add((type(model).__qualname__, model.training, tuple(x.shape), shapes))

    how = how or _HOW.get()
    twice = create_graph or how == "functional"

    def value(leaves: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with _forward(drawn, twice=twice):
            logits = functional_call(model, {**leaves, **held}, (x,))
        return loss(logits, y)

    if how == "functional":
        traced: dict[str, Tensor] = torch.func.grad(value)(dict(parameters), x, y)
        return traced
    if how == "finite" and create_graph:
        moving = next((n for n, p in parameters.items() if p.requires_grad and not own), None)
        if moving is not None:
            raise InvalidInput(
                f"Finite differences give slopes in images and labels only, not through weights "
                f"({moving!r} is to be moved). Choose another execution, such as 'eager'."
            )
        names = list(parameters)
        point = [parameters[name].detach() for name in names]
        tensors = _FiniteDifferences.apply(
            lambda p, x, y: value(dict(zip(names, p, strict=True)), x, y), point, x, y
        )
        return dict(zip(names, tensors, strict=True))
    leaves = {
        name: p if p.requires_grad else p.detach().requires_grad_()
        for name, p in parameters.items()
    }
    if own:
        with _forward(drawn, twice=twice):
            logits = model(x)
        found = _zero_filled(loss(logits, y), list(leaves.values()), create_graph)
        return dict(zip(leaves, found, strict=True))
    return dict(zip(leaves, _zero_filled(value(leaves, x, y), list(leaves.values()), create_graph),
                    strict=True))  # fmt: skip


@contextmanager
def _forward(drawn: Drawn, *, twice: bool) -> Iterator[None]:
    """The surroundings of one forward pass."""
    with ExitStack() as stack:
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if drawn == "mean":
            stack.enter_context(randomness.averaged())
        elif drawn != "new":
            stack.enter_context(randomness.replayed(drawn))
        yield


def _zero_filled(value: Tensor, leaves: Sequence[Tensor], create_graph: bool) -> list[Tensor]:
    """Gradients by the tape, zeros where a leaf takes no part."""
    found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


class _FiniteDifferences(torch.autograd.Function):
    r"""The gradient :math:`g(x) = \nabla_\theta L`, with a backward by central differences.

    .. math:: \partial_x \langle g(x), v\rangle \approx
        \frac{\nabla_x L(\theta + h v) - \nabla_x L(\theta - h v)}{2h},
        \qquad h = u^{1/3} \frac{\lVert\theta\rVert}{\lVert v\rVert}

    with u the rounding unit: two passes down to the input instead of one over the tape. The bias is
    :math:`O(h^2)` on smooth networks and depends on crossed kinks on piecewise linear ones.
    """

    @staticmethod
    def forward(ctx: Any, value: Any, point: list[Tensor], x: Tensor, y: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in point]
            found = _zero_filled(value(leaves, x.detach(), y.detach()), leaves, False)
        ctx.value, ctx.point = value, point
        ctx.save_for_backward(x, y)
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *v: Tensor) -> Any:
        size = torch.stack([t.square().sum() for t in v]).sum().sqrt()
        norm = torch.stack([p.square().sum() for p in ctx.point]).sum().sqrt()
        unit = torch.finfo(size.dtype).eps ** (1 / 3)
        h = torch.where(size > 0, unit * norm / size, torch.zeros_like(size))
        inputs = [
            t.detach().requires_grad_() if needed else t.detach()
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:4], strict=True)
        ]
        wanted = [t for t in inputs if t.requires_grad]
        ends = []
        with torch.enable_grad():
            for sign in (1, -1):
                moved = [p + sign * h * t for p, t in zip(ctx.point, v, strict=True)]
                ends.append(_zero_filled(ctx.value(moved, *inputs), wanted, False))
        slopes = [
            torch.where(size > 0, (up - down) / (2 * h), torch.zeros_like(up))
            for up, down in zip(*ends, strict=True)
        ]
        return None, None, *(slopes.pop(0) if t.requires_grad else None for t in inputs)


def without_running_statistics(model: nn.Module) -> nn.Module:
    """``model`` with BN layers in train mode that no longer update their running statistics.

    Train-mode outputs do not depend on them, and a replay that writes nothing can be batched and
    traced. Changes ``model`` in place; eval-mode layers stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training:
            module.track_running_stats = False
    return model


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
    augment: Augment | None = None,
    checkpoint: bool | None = None,
    drawn: Sequence[Drawn] | Literal["mean", "new"] = "mean",
) -> dict[str, Tensor]:
    """``after - before`` of FedAVG's local training, differentiable in ``x`` and ``y``.

    Follows SGD with momentum and weight decay, or Adam, step by step. BN running statistics do
    not enter a train-mode forward pass and stay fixed in eval mode, so they are not unrolled.

    Args:
        model: The architecture.
        parameters: The trained weights before training, by name; others stay at the model's own.
        buffers: By name.
        x: ``(N, C, H, W)``, model space.
        y: Targets of the loss, such as ``(N,)`` labels or ``(N, K)`` probabilities.
        protocol: The local hyperparameters.
        batches: Example indices of every step; in the given order, epoch by epoch, if None.
        loss: ``(logits, y) -> scalar``.
        batch_map: What the client does to a batch before the step.
        augment: How it transforms its images before that, by step.
        checkpoint: Keep the weights of every step instead of its graph and compute a step again
            when its derivative is due: the memory of one step for about 1.4 times the work. From
            :data:`CHECKPOINT_FROM` steps on if None.
        drawn: What every local step's forward pass draws.

    Raises:
        InvalidInput: If draws are given for another number of steps, or under
            ``derivative("finite")``, which differentiates one gradient only.
    """
    how = _HOW.get()
    if how == "finite":
        raise InvalidInput(
            "Finite differences replay a single gradient (FedSGD); this client takes local steps. "
            "Choose another execution, such as 'eager'."
        )
    if batches is None:
        epoch = torch.arange(len(x)).split(protocol.batch_size)
        batches = [batch for _ in range(protocol.epochs) for batch in epoch]
    if checkpoint is None:
        checkpoint = len(batches) >= CHECKPOINT_FROM
    each = _by_step(drawn, len(batches))
    names = list(parameters)
    start = [parameters[name].detach() for name in names]
    zeros = [torch.zeros_like(p) for p in start]
    carried = [start, *([zeros] * slots(protocol))]  # weights, then the optimizer's memory

    def step(t: int, batch: Tensor, x: Tensor, y: Tensor, *flat: Tensor) -> list[Tensor]:
        """One local step on weights and memory, all in one flat list."""
        n = len(names)
        weights, *memory = [list(flat[i : i + n]) for i in range(0, len(flat), n)]
        x_step, y_step = x[batch], y[batch]
        if augment is not None:
            x_step = augment(x_step, t - 1)
        if batch_map is not None:
            x_step, y_step = batch_map(x_step, y_step)
        found = gradient(
            model, dict(zip(names, weights, strict=True)), buffers, x_step, y_step,
            loss=loss, how=how, drawn=each[t - 1],
        )  # fmt: skip
        g = [found[name] for name in names]
        if protocol.weight_decay:
            g = [d + protocol.weight_decay * p for d, p in zip(g, weights, strict=True)]
        if protocol.optimizer == "adam":
            g, *memory = _adam(g, memory[0], memory[1], t, protocol.betas)
        elif protocol.momentum:
            g = [protocol.momentum * v + d for v, d in zip(memory[0], g, strict=True)]
            memory = [g]
        weights = [p - protocol.lr * d for p, d in zip(weights, g, strict=True)]
        return [tensor for group in (weights, *memory) for tensor in group]

    flat = [tensor for group in carried for tensor in group]
    for t, batch in enumerate(batches, start=1):
        if checkpoint and how == "autograd":
            flat = list(_Forgotten.apply(step, t, batch, x, y, *flat))
        else:
            flat = step(t, batch, x, y, *flat)
    return {name: flat[i] - start[i] for i, name in enumerate(names)}


def slots(protocol: FedAVG) -> int:
    """Tensors that the local optimizer remembers for every weight."""
    return 2 if protocol.optimizer == "adam" else int(bool(protocol.momentum))


def _by_step(drawn: Sequence[Drawn] | Literal["mean", "new"], steps: int) -> list[Drawn]:
    if drawn == "mean" or drawn == "new":
        return [drawn] * steps
    if len(drawn) != steps:
        raise InvalidInput(
            f"Draws of {len(drawn)} local steps were given for a client that takes {steps}."
        )
    return list(drawn)


class _Forgotten(torch.autograd.Function):
    """A local step without its graph; it is computed again when its derivative is due.

    PyTorch's own checkpoint cannot be used: a local step takes a derivative itself, within the
    region that would be checkpointed.
    """

    @staticmethod
    def forward(ctx: Any, step: Any, t: int, batch: Tensor, *tensors: Tensor) -> Any:
        ctx.step, ctx.t, ctx.batch = step, t, batch
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            found = step(t, batch, *[tensor.detach() for tensor in tensors])
        return tuple(tensor.detach() for tensor in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            inputs = [
                tensor.detach().requires_grad_() if wanted else tensor.detach()
                for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)
            ]
            found = ctx.step(ctx.t, ctx.batch, *inputs)
            pairs = [(f, c) for f, c in zip(found, cotangents, strict=True) if f.requires_grad]
            leaves = [tensor for tensor in inputs if tensor.requires_grad]
            slopes = torch.autograd.grad(
                [f for f, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True
            )
        queue = iter(slopes)
        return None, None, None, *(next(queue) if wanted else None for wanted in needed)


def _adam(
    g: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    t: int,
    betas: tuple[float, float],
    epsilon: float = 1e-8,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Adam's direction at step ``t`` (from 1), and its moments after it."""
    first = [betas[0] * m + (1 - betas[0]) * d for m, d in zip(first, g, strict=True)]
    second = [betas[1] * v + (1 - betas[1]) * d.square() for v, d in zip(second, g, strict=True)]
    directions = []
    for m, v in zip(first, second, strict=True):
        v_hat = v / (1 - betas[1] ** t)
        # sqrt has an infinite slope at 0; dead units are exactly there.
        alive = v_hat > 0
        zero = torch.zeros_like(v_hat)
        root = torch.where(alive, torch.where(alive, v_hat, torch.ones_like(v_hat)).sqrt(), zero)
        directions.append(m / (1 - betas[0] ** t) / (root + epsilon))
    return directions, first, second


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
    augment: Augment | None = None,
    own: bool = False,
    drawn: Sequence[Drawn] | Literal["mean", "new"] = "mean",
) -> dict[str, Tensor]:
    """The client's quantity (gradient or delta) for candidates ``x, y``; see the two above.

    The loss is the protocol's, if None.
    """
    if isinstance(protocol, FedAVG):
        return unroll(
            model, parameters, buffers, x, y, protocol,
            batches=batches, loss=loss or protocol.loss, batch_map=batch_map, augment=augment,
            drawn=drawn,
        )  # fmt: skip
    if augment is not None:
        x = augment(x, 0)
    if batch_map is not None:
        x, y = batch_map(x, y)

    def reduced(logits: Tensor, target: Tensor) -> Tensor:
        value: Tensor = protocol.loss(logits, target, protocol.reduction)
        return value

    return gradient(
        model, parameters, buffers, x, y,
        loss=loss or reduced, own=own, drawn=_by_step(drawn, 1)[0],
    )  # fmt: skip


class Client(typing.Protocol):
    """``(x, y, drawn=draws of every local step) -> update``."""

    def __call__(
        self, x: Tensor, y: Tensor, *, drawn: Sequence[Draws] | None = None
    ) -> dict[str, Tensor]:
        """What the client would have sent; forward passes draw ``drawn``, if it is given."""


def client(
    model: nn.Module,
    protocol: FedSGD | FedAVG,
    update: Update,
    *,
    defenses: Sequence[Defense] = (),
    secrets: Mapping[str, Tensor] = NOTHING,
    order: Sequence[Tensor] | None = None,
    drawn: Sequence[Drawn] | Literal["mean", "new"] = "mean",
    augment: Augment | None = None,
    own: bool = False,
) -> Client:
    """The whole of a client's work as a pure function ``(x, y) -> update``, in ``update``'s units.

    A caller may bring masks of its own for every call, differentiable ones too.

    Args:
        model: Holding what the client received, in its mode; parameters that take no gradient are
            constants. Not changed.
        protocol: Its loss, and local steps for a delta.
        update: What names, kind, sign, scale and reduction are taken from; defenses' mirrors read
            positions and norms from it.
        defenses: Whose mirrors are applied, in the client's order.
        secrets: What is known of those defenses' secrets, as ``defense key/name``.
        order: Example indices of every local step; in the candidates' order if None.
        drawn: What forward passes draw where a call brings no draws.
        augment: How the client transforms its images, by step; not at all if None.
        own: See :func:`gradient`.

    Raises:
        InvalidInput: If the update does not belong to the model.
    """
    trained: dict[str, Tensor] = dict(_trained(model, update))
    if isinstance(protocol, FedSGD):  # local steps move all of them, one gradient need not
        trained = {name: trained[name] for name in update.tensors}
    if not own:
        trained = {name: p.detach() for name, p in trained.items()}
    held = {name: b.detach() for name, b in model.named_buffers()}
    before = {name: trained[name].detach() for name in update.tensors}
    loss, batch_map = _mirrored(model, protocol, update, defenses, secrets)

    default = drawn

    def run(x: Tensor, y: Tensor, *, drawn: Sequence[Draws] | None = None) -> dict[str, Tensor]:
        quantity = simulate_client(
            model, trained, held, x, y, protocol,
            batches=order if isinstance(protocol, FedAVG) else None,
            loss=loss, batch_map=batch_map, augment=augment, own=own,
            drawn=default if drawn is None else drawn,
        )  # fmt: skip
        if update.kind != "gradient" and isinstance(protocol, FedSGD):
            quantity = {name: -protocol.lr * quantity[name] for name in update.tensors}
        if update.kind == "weights":
            quantity = {name: before[name] + quantity[name] for name in update.tensors}
        return _sent(quantity, x, y, update, defenses, secrets)

    return run


class OneStep(typing.Protocol):
    """``(x, y, at=weights) -> update``."""

    def __call__(
        self, x: Tensor, y: Tensor, *, at: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The gradient at ``at`` (the received weights if None), in the units of the update."""


def one_step(
    model: nn.Module,
    protocol: FedSGD | FedAVG,
    update: Update,
    *,
    steps: int,
    defenses: Sequence[Defense] = (),
    secrets: Mapping[str, Tensor] = NOTHING,
    drawn: Drawn = "mean",
) -> OneStep:
    """A single gradient at weights of the caller's choice, standing for the whole update.

    For a delta it is multiplied by ``-lr T``, as if every local step had taken the same gradient;
    with that the mirrors of defenses see an upload of the right size. Differentiable in the
    weights, too.

    Args:
        model: As for :func:`client`.
        protocol: Loss and learning rate.
        update: As for :func:`client`.
        steps: Local steps T behind a delta.
        defenses: As for :func:`client`.
        secrets: As for :func:`client`.
        drawn: What the forward pass draws.

    Raises:
        InvalidInput: If the update or ``at`` does not belong to the model.
    """
    trained = _trained(model, update)
    held = {name: b.detach() for name, b in model.named_buffers()}
    wanted = {name: trained[name].detach() for name in update.tensors}
    loss, batch_map = _mirrored(model, protocol, update, defenses, secrets)
    stand_in = 1.0 if update.kind == "gradient" else -protocol.lr * steps

    def run(x: Tensor, y: Tensor, *, at: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        moved = dict(at or {})
        for name, tensor in moved.items():
            if name not in trained or tensor.shape != trained[name].shape:
                raise InvalidInput(
                    f"at: {name!r} of shape {tuple(tensor.shape)} is no trained parameter of "
                    f"{type(model).__name__}; it has: {', '.join(trained)}."
                )
        fixed = {n: t for n, t in moved.items() if n not in wanted}
        x_seen, y_seen = batch_map(x, y)
        quantity = gradient(
            model, {**wanted, **{n: moved[n] for n in wanted if n in moved}}, {**held, **fixed},
            x_seen, y_seen, loss=loss, drawn=drawn,
        )  # fmt: skip
        quantity = {name: stand_in * tensor for name, tensor in quantity.items()}
        if update.kind == "weights":
            quantity = {name: wanted[name] + tensor for name, tensor in quantity.items()}
        return _sent(quantity, x, y, update, defenses, secrets)

    return run


def _trained(model: nn.Module, update: Update) -> dict[str, nn.Parameter]:
    trained = state.trained(model)
    update.check_fits(dict(model.named_parameters()))
    constant = next((name for name in update.tensors if name not in trained), None)
    if constant is not None:
        raise InvalidInput(
            f"The update has a tensor {constant!r}, which takes no gradient in this model; set "
            "requires_grad=True where the client trains."
        )
    return trained


def _mirrored(
    model: nn.Module,
    protocol: FedSGD | FedAVG,
    update: Update,
    defenses: Sequence[Defense],
    secrets: Mapping[str, Tensor],
) -> tuple[Loss, BatchMap]:
    """The client's loss and what happens to its batches, with the defenses' mirrors."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        value: Tensor = protocol.loss(logits, y, update.reduction)
        for defense in defenses:
            value = defense.simulate_loss(value, model)
        return value

    def batch_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for defense in defenses:
            known = _own(secrets, defense)
            x, y = (
                defense.simulate_batch_knowing(x, y, known)
                if known
                else defense.simulate_batch(x, y)
            )
        return x, y

    return loss, batch_map


def _sent(
    quantity: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    update: Update,
    defenses: Sequence[Defense],
    secrets: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The quantity in the units of the message, after the mirrors of what happens to updates."""
    factor = update.sign * update.scale
    sent = {name: quantity[name] * factor for name in update.tensors}
    for defense in defenses:
        known = _own(secrets, defense)
        sent = (
            defense.simulate_knowing(sent, x, y, update, known)
            if known
            else defense.simulate(sent, x, y, update)
        )
    return sent


def _own(secrets: Mapping[str, Tensor], defense: Defense) -> dict[str, Tensor]:
    """What is known of one defense's secrets, by its own names."""
    prefix = f"{defense.key}/"
    return {n.removeprefix(prefix): t for n, t in secrets.items() if n.startswith(prefix)}
