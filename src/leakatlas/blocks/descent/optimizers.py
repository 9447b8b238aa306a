"""What moves the variables: PyTorch's optimizers, and an L-BFGS that keeps candidates apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from leakatlas.errors import InvalidParameter

CURVATURE = 1e-10
"""A pair of L-BFGS whose ``y.s`` is not above this is not kept, as in PyTorch."""


class Optimizer(Protocol):
    """What the loop asks of an optimizer; those of ``torch.optim`` fit."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups whose ``"lr"`` the schedule scales."""

    def step(self, closure: Callable[[], Any]) -> object:
        """One step; calls ``closure`` once or more."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, enough to go on exactly."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


@dataclass(frozen=True)
class Factory:
    """How to make an optimizer.

    Args:
        make: ``(leaves, candidates) -> optimizer``; ``candidates`` is None where the leaves are
            those of a single candidate, else dimension 0 of every leaf counts candidates.
        batches: Whether one optimizer can move several candidates without mixing them.
    """

    make: Callable[[dict[str, Tensor], int | None], Optimizer]
    batches: bool = True


Rates = float | Mapping[str, float]
"""One learning rate for all variables, or one for each by name."""


def adam(lr: Rates, *, betas: tuple[float, float] = (0.9, 0.999)) -> Factory:
    """Adam over all variables."""
    return Factory(lambda leaves, _: torch.optim.Adam(_groups(leaves, lr), betas=betas))


def sgd(lr: Rates, *, momentum: float = 0.0) -> Factory:
    """Gradient descent; with :func:`~leakatlas.blocks.descent.signed`, plain signed steps."""
    return Factory(lambda leaves, _: torch.optim.SGD(_groups(leaves, lr), momentum=momentum))


def rmsprop(lr: Rates, *, momentum: float = 0.0) -> Factory:
    """RMSprop over all variables."""
    return Factory(lambda leaves, _: torch.optim.RMSprop(_groups(leaves, lr), momentum=momentum))


def _groups(leaves: Mapping[str, Tensor], lr: Rates) -> list[dict[str, Any]]:
    """Variables that share a learning rate, as optimizers of torch take them.

    Raises:
        InvalidParameter: If rates and variables have other names.
    """
    if not isinstance(lr, Mapping):
        return [{"params": list(leaves.values()), "lr": lr}]
    if lr.keys() != leaves.keys():
        raise InvalidParameter(
            f"Learning rates are given for {', '.join(lr) or 'nothing'}; the variables are "
            f"{', '.join(leaves)}."
        )
    return [{"params": [leaf], "lr": lr[name]} for name, leaf in leaves.items()]


def lbfgs(
    lr: float = 1.0, *, history: int = 100, inner: int = 20, line_search: bool = False
) -> Factory:
    """L-BFGS without PyTorch's stopping tolerances, which end a run silently far from its end.

    With the strong Wolfe line search, whose number of evaluations differs between candidates,
    candidates run one after the other; without it, all of them at once.

    Args:
        lr: Step size.
        history: Curvature pairs that are kept.
        inner: Iterations within a step.
        line_search: Whether steps obey the strong Wolfe conditions.
    """

    def make(leaves: dict[str, Tensor], candidates: int | None) -> Optimizer:
        if candidates is not None:
            return BatchedLBFGS(
                list(leaves.values()), candidates, lr=lr, inner=inner, history=history
            )
        return torch.optim.LBFGS(
            list(leaves.values()),
            lr=lr,
            max_iter=inner,
            history_size=history,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe" if line_search else None,
        )

    return Factory(make, batches=not line_search)


class BatchedLBFGS:
    """L-BFGS of ``torch.optim`` without line search, for candidates that must not mix.

    The same two loops (Nocedal and Wright, Algorithm 7.4), with one inner product for each
    candidate. A candidate without curvature in a step keeps its scale and gets an empty pair,
    where PyTorch would keep its oldest one.

    Args:
        leaves: Each ``(R, ...)``; their ``grad`` is set by the closure.
        candidates: R.
        lr: Step size.
        inner: Iterations of one step.
        history: Pairs that are kept.
    """

    def __init__(
        self, leaves: Sequence[Tensor], candidates: int, *, lr: float, inner: int, history: int
    ) -> None:
        self.leaves = list(leaves)
        self.candidates = candidates
        self.inner, self.history = inner, history
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]
        self._iterations = 0
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self._memory: dict[str, Tensor] = {}

    def step(self, closure: Callable[[], Any]) -> object:
        """``inner`` iterations, one evaluation each."""
        loss = closure()
        g = self._gradient()
        lr = self.param_groups[0]["lr"]
        for index in range(self.inner):
            d = self._direction(g)
            if self._iterations == 0:
                length = lr * torch.clamp(1 / g.abs().sum(1, keepdim=True), max=1.0)
            else:
                length = torch.full_like(g[:, :1], lr)
            # Uphill, or not finite: this candidate rests.
            falls = (g * d).sum(1, keepdim=True) <= 0
            s = torch.where(falls, length * d, torch.zeros_like(d))
            self._memory |= {"s": s, "g": g}
            self._iterations += 1
            self._move(s)
            if index + 1 < self.inner:
                closure()
                g = self._gradient()
        return loss

    def _direction(self, g: Tensor) -> Tensor:
        """Minus the inverse Hessian's estimate times ``g`` ``(R, n)``."""
        if not self._memory:
            self._memory["scale"] = torch.ones_like(g[:, :1])
            return -g
        y, s = g - self._memory["g"], self._memory["s"]
        ys = (y * s).sum(1, keepdim=True)
        curved = ys > CURVATURE
        zero = torch.zeros_like(ys)
        rho = torch.where(curved, 1 / torch.where(curved, ys, zero + 1), zero)
        if bool(curved.any()):
            if len(self._pairs) == self.history:
                self._pairs.pop(0)
            self._pairs.append((y, s, rho))
        squares = (y * y).sum(1, keepdim=True)
        scale = torch.where(
            curved, ys / torch.where(curved, squares, zero + 1), self._memory["scale"]
        )
        self._memory["scale"] = scale
        q = -g
        alphas = []
        for y, s, rho in reversed(self._pairs):
            alphas.append((s * q).sum(1, keepdim=True) * rho)
            q = q - alphas[-1] * y
        d = q * scale
        for (y, s, rho), alpha in zip(self._pairs, reversed(alphas), strict=True):
            d = d + s * (alpha - (y * d).sum(1, keepdim=True) * rho)
        return d

    def _gradient(self) -> Tensor:
        grads = [leaf.grad for leaf in self.leaves]
        return torch.cat([g.reshape(self.candidates, -1) for g in grads if g is not None], dim=1)

    def _move(self, s: Tensor) -> None:
        sizes = [leaf.numel() // self.candidates for leaf in self.leaves]
        with torch.no_grad():
            for leaf, part in zip(self.leaves, s.split(sizes, dim=1), strict=True):
                leaf.add_(part.reshape(leaf.shape))

    def state_dict(self) -> dict[str, Any]:
        """Iterations, pairs and memory."""
        return {
            "lr": self.param_groups[0]["lr"],
            "iterations": self._iterations,
            "pairs": [list(pair) for pair in self._pairs],
            "memory": dict(self._memory),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.param_groups[0]["lr"] = state_dict["lr"]
        self._iterations = state_dict["iterations"]
        self._pairs = [(y, s, rho) for y, s, rho in state_dict["pairs"]]
        self._memory = dict(state_dict["memory"])


class InTurn:
    """One optimizer per group of variables; each step lets the next group move, the rest rest."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)
        self._turn = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups of all optimizers."""
        return [group for one in self._optimizers for group in one.param_groups]

    def step(self, closure: Callable[[], Any]) -> object:
        """One step of the next optimizer."""
        optimizer = self._optimizers[self._turn % len(self._optimizers)]
        self._turn += 1
        return optimizer.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is, and the state of each."""
        return {"turn": self._turn, "each": [one.state_dict() for one in self._optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._turn = state_dict["turn"]
        for one, state in zip(self._optimizers, state_dict["each"], strict=True):
            one.load_state_dict(state)


def in_turn(factory: Factory, groups: Sequence[Sequence[str]]) -> Factory:
    """``factory`` once for each group of variable names, stepped in turn."""
    return Factory(
        lambda leaves, candidates: InTurn(
            [factory.make({n: leaves[n] for n in names}, candidates) for names in groups]
        ),
        batches=factory.batches,
    )
