"""The loop under every method that minimises: it takes functions, never the name of a method.

A candidate is a mapping of named variables. The objective returns what to minimise and, if that
is something else, the criterion by which the adversary ranks iterates; the best iterate is kept on
the device. A criterion of shape ``(R,)`` says that dimension 0 of every variable counts R
independent candidates: each keeps its own best, and one that turns non-finite is halted while the
others go on. The loop reads values back to the host only every ``report_every`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from leakatlas.blocks.watch import Step, Watch
from leakatlas.data import Box

Variables = Mapping[str, Tensor]


class Value(NamedTuple):
    """An objective at one point.

    Args:
        total: Scalar to minimise; the sum over candidates if there are several.
        criterion: Scalar or ``(R,)`` by which the adversary ranks; smaller is better.
    """

    total: Tensor
    criterion: Tensor


class Optimizer(Protocol):
    """What the loop asks of an optimizer; those of ``torch.optim`` fit."""

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """Groups whose ``"lr"`` the schedule scales."""

    def step(self, closure: Callable[[], Tensor]) -> object:
        """One step; calls ``closure`` once or more."""


Objective = Callable[[Variables, Step], Tensor | Value]
Factory = Callable[[dict[str, Tensor]], Optimizer]
Schedule = Callable[[float], float]
Transform = Callable[[Tensor], Tensor]
Hook = Callable[[Variables, float, Step], None]
"""``(variables, learning rate, step)``, changes the variables in place after a step."""


@dataclass(frozen=True)
class Descended:
    """Where a descent ended.

    Args:
        best: The best iterate by the criterion; the start where none was ever finite.
        last: The last iterate.
        criterion: Scalar or ``(R,)`` of ``best``; infinite where none was ever finite.
        alive: Whether the candidate (or each of R) stayed finite; same shape.
        steps: Iterations done.
        trace: ``(reports,)`` or ``(reports, R)``: the best criterion so far, at every report.
    """

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    criterion: Tensor
    alive: Tensor
    steps: int
    trace: Tensor


def descend(
    objective: Objective,
    start: Variables,
    *,
    optimizer: Factory,
    steps: int,
    watch: Watch,
    schedule: Schedule | None = None,
    transform: Transform | None = None,
    after: Sequence[Hook] = (),
    done: Callable[[Tensor], bool] | None = None,
    report_every: int = 25,
) -> Descended:
    """Minimise ``objective`` from ``start``.

    Args:
        objective: ``(variables, step) -> scalar`` or :class:`Value`.
        start: Named tensors; copied.
        optimizer: Makes the optimizer of the named leaves.
        steps: Iterations; a budget may end the loop sooner.
        watch: Budget and progress.
        schedule: ``progress in [0, 1) -> factor`` on the optimizer's learning rates.
        transform: Applied to each variable's gradient, such as :func:`signed`.
        after: Hooks after every step, in order: noise, projection.
        done: ``best criterion -> whether to end``, asked at every report.
        report_every: Steps between reads of device values by the host.
    """
    leaves = {n: t.detach().clone().requires_grad_() for n, t in start.items()}
    engine = optimizer(leaves)
    base = [float(str(group["lr"])) for group in engine.param_groups]
    best = {n: t.detach().clone() for n, t in leaves.items()}
    lowest: Tensor | None = None
    alive: Tensor | None = None
    trace: list[Tensor] = []
    now = Step(0, 0.0)

    def offer(value: Tensor | Value) -> Value:
        nonlocal lowest, alive
        value = value if isinstance(value, Value) else Value(value, value)
        criterion = value.criterion.detach()
        if lowest is None or alive is None:
            lowest = torch.full_like(criterion, math.inf)
            alive = torch.ones_like(criterion, dtype=torch.bool)
        alive = alive & torch.isfinite(criterion)
        better = alive & (criterion < lowest)
        lowest = torch.where(better, criterion, lowest)
        for name, leaf in leaves.items():
            best[name] = torch.where(_rows(better, leaf), leaf.detach(), best[name])
        return value

    def closure() -> Tensor:
        total = offer(objective(leaves, now)).total
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for leaf, gradient in zip(leaves.values(), gradients, strict=True):
            step = torch.zeros_like(leaf) if gradient is None else gradient
            step = transform(step) if transform is not None else step
            assert alive is not None
            leaf.grad = torch.where(_rows(alive, leaf), step, torch.zeros_like(leaf))
        return total.detach()

    for now in watch.steps(steps):
        factor = 1.0 if schedule is None else schedule(now.progress)
        for group, lr in zip(engine.param_groups, base, strict=True):
            group["lr"] = lr * factor
        engine.step(closure)
        assert alive is not None and lowest is not None
        with torch.no_grad():
            for hook in after:
                hook(leaves, base[0] * factor, now)
            alive = _halt(leaves, best, alive)
        if (now.index + 1) % report_every == 0:
            trace.append(lowest)
            if watch.listen is not None:
                watch.note = f"criterion {float(lowest.min()):.3g}"
            if not bool(alive.any()) or (done is not None and done(lowest)):
                break
    last = {n: leaf.detach().clone() for n, leaf in leaves.items()}
    offer(objective(leaves, now))
    assert alive is not None and lowest is not None
    return Descended(best, last, lowest, alive, now.index + 1, torch.stack([*trace, lowest]))


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A per-candidate mask, shaped to select whole candidates of ``like``."""
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def _halt(leaves: Variables, best: Variables, alive: Tensor) -> Tensor:
    """Put candidates that are no longer finite back to their best, and mark them."""
    for leaf in leaves.values():
        finite = torch.isfinite(leaf)
        alive = alive & (finite.flatten(1).all(1) if alive.dim() else finite.all())
    for name, leaf in leaves.items():
        leaf.copy_(torch.where(_rows(alive, leaf), leaf, best[name]))
    return alive


# -- optimizers ------------------------------------------------------------------------------


def adam(lr: float, *, betas: tuple[float, float] = (0.9, 0.999)) -> Factory:
    """Adam over all variables."""
    return lambda leaves: torch.optim.Adam(list(leaves.values()), lr=lr, betas=betas)


def sgd(lr: float, *, momentum: float = 0.0) -> Factory:
    """Gradient descent; with :func:`signed` as the transform, plain signed steps."""
    return lambda leaves: torch.optim.SGD(list(leaves.values()), lr=lr, momentum=momentum)


def lbfgs(
    lr: float = 1.0, *, history: int = 100, inner: int = 20, line_search: bool = False
) -> Factory:
    """L-BFGS without PyTorch's stopping tolerances, which end a run silently far from its end."""
    return lambda leaves: torch.optim.LBFGS(
        list(leaves.values()),
        lr=lr,
        max_iter=inner,
        history_size=history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe" if line_search else None,
    )


class InTurn:
    """One optimizer per group of variables; each step lets the next group move, the rest rest."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._turn = 0

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """All groups of all optimizers."""
        return [group for one in self._optimizers for group in one.param_groups]

    def step(self, closure: Callable[[], Tensor]) -> object:
        """One step of the next optimizer."""
        optimizer = self._optimizers[self._turn % len(self._optimizers)]
        self._turn += 1
        return optimizer.step(closure)


def in_turn(factory: Factory, groups: Sequence[Sequence[str]]) -> Factory:
    """``factory`` once for each group of variable names, stepped in turn."""
    return lambda leaves: InTurn([factory({n: leaves[n] for n in names}) for names in groups])


# -- schedules, transforms, hooks ------------------------------------------------------------


def step_decay(at: Sequence[float], factor: float = 0.1) -> Schedule:
    """Multiply by ``factor`` at each of the given shares of the run."""
    return lambda progress: factor ** sum(progress >= share for share in at)


def cosine_decay(warmup: float = 0.0) -> Schedule:
    """Linear rise over the first ``warmup`` of the run, then half a cosine down to 0."""

    def schedule(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return schedule


def signed(gradient: Tensor) -> Tensor:
    """The sign: every pixel moves by the same step (through Adam, nearly so)."""
    return gradient.sign()


def inside(box: Box, name: str) -> Hook:
    """Projection of one variable, ``(..., C, H, W)`` in model space, onto the pixel box."""

    def project(variables: Variables, lr: float, step: Step) -> None:
        del lr, step
        variables[name].copy_(box.clip(variables[name]))

    return project


def langevin(scale: float, name: str, *, generator: torch.Generator) -> Hook:
    """Noise of standard deviation ``lr * scale`` on a variable, after the optimizer's step."""

    def shake(variables: Variables, lr: float, step: Step) -> None:
        del step
        x = variables[name]
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        x.add_(noise, alpha=lr * scale)

    return shake
