"""How the slope of an objective is computed, and the choice among the ways.

==================  ==============================================================================
``eager``           the tape, one candidate after the other
``channels_last``   the same on images laid out channels last; GPU only (the CPU kernels of torch
                    2.15 corrupt memory in the second backward pass of such convolutions)
``vmap``            ``torch.func``, all candidates at once
``traced``          the same recorded once as a graph of tensor operations, then replayed: neither
                    Python nor a tape in the loop
``compiled``        that graph compiled by ``torch.compile``
``finite``          central differences instead of the second backward pass; biased, never chosen
                    by itself
==================  ==============================================================================

All but ``finite`` are exact. ``auto`` begins with ``eager``, whose first steps are timed, and
tries another way only where what is left of the run would repay the set-up; a way is adopted if
it agrees with ``eager`` at the present point and is faster. Short runs therefore never leave
``eager`` and repeat bit for bit; name an execution to repeat a long one bit for bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from leakatlas.blocks.descent.objective import Objective, Variables, valued
from leakatlas.blocks.watch import Execution
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.fl.replay import derivative, recorded

EXECUTIONS: tuple[Execution, ...] = get_args(Execution)

PARITY = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative difference from ``eager`` with which a way is adopted."""

TIMED = 3
"""Eager evaluations that are timed before anything else is tried."""

TRIALS: dict[Execution, tuple[float, float, float]] = {
    "channels_last": (0.0, 2.0, 0.05),
    "vmap": (0.2, 4.0, 0.30),
    "traced": (1.0, 200.0, 0.15),
    "compiled": (45.0, 200.0, 0.25),
}
"""What a way is expected to cost and give before it was ever measured here: seconds, plus eager
evaluations, of set-up; and the share that it saves of the best way so far. Tracing visits every
operation in Python: on a busy machine the longest set-up that was seen took 24 s where an eager
evaluation took 0.1 s."""

AFFORDED = 0.1
"""Share of what is left of a budget that setting a way up may cost."""


Point = tuple[Variables, Variables, Tensor]
"""``(variables, constants, t)``."""


class Slope(NamedTuple):
    """Derivative, total and criterion; with R candidates the latter two are ``(R,)``."""

    gradients: dict[str, Tensor]
    total: Tensor
    criterion: Tensor


Slopes = Callable[[Variables, Variables, Tensor], Slope]


class Measured(NamedTuple):
    """What a way was measured to cost: set-up, and one evaluation, in seconds."""

    setup: float
    seconds: float


_KNOWN: dict[tuple[object, ...], dict[Execution, Measured]] = {}
"""Measured costs by case, so that the next run of the same case does not try again."""


def slopes(execution: Execution, objective: Objective, candidates: int | None, at: Point) -> Slopes:
    """The slope of ``objective`` by one way.

    Args:
        execution: Any but ``auto``.
        objective: Of one candidate.
        candidates: R, or None.
        at: Where a way is set up; a traced one takes only tensors of these shapes afterwards.
    """
    match execution:
        case "eager" | "channels_last" | "finite":
            return _eager(objective, candidates, execution)
        case "vmap":
            return _functional(objective, candidates)
        case "traced":
            return _traced(objective, candidates, at, compiled=False)
        case "compiled":
            return _traced(objective, candidates, at, compiled=True)
        case _:
            raise UnknownName("execution", execution, EXECUTIONS[1:])


def _eager(objective: Objective, candidates: int | None, execution: Execution) -> Slopes:
    def one(variables: Variables, constants: Variables, t: Tensor) -> Slope:
        if execution == "channels_last" and not t.is_cuda:
            raise RuntimeError("channels last is for GPUs; torch's CPU kernels corrupt memory")
        leaves = {n: v.detach().requires_grad_() for n, v in variables.items()}
        seen: dict[str, Tensor] = dict(leaves)
        if execution == "channels_last":
            for name, leaf in leaves.items():
                if leaf.dim() == 4:
                    seen[name] = leaf.contiguous(memory_format=torch.channels_last)
        with derivative("finite" if execution == "finite" else "autograd"):
            value = valued(objective, {**seen, **constants}, t)
            found = torch.autograd.grad(value.total, list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }
        return Slope(gradients, value.total.detach(), value.criterion.detach())

    if candidates is None:
        return one

    def alone(variables: Variables, constants: Variables, t: Tensor) -> Slope:
        found = one({n: v[0] for n, v in variables.items()}, constants, t)
        gradients = {n: g.unsqueeze(0) for n, g in found.gradients.items()}
        return Slope(gradients, found.total.unsqueeze(0), found.criterion.unsqueeze(0))

    def each(variables: Variables, constants: Variables, t: Tensor) -> Slope:
        found = [
            one({n: v[i] for n, v in variables.items()}, constants, t) for i in range(candidates)
        ]
        return Slope(
            {n: torch.stack([f.gradients[n] for f in found]) for n in variables},
            torch.stack([f.total for f in found]),
            torch.stack([f.criterion for f in found]),
        )

    return alone if candidates == 1 else each


def _functional(objective: Objective, candidates: int | None) -> Slopes:
    def value(variables: Variables, constants: Variables, t: Tensor) -> tuple[Tensor, Tensor]:
        found = valued(objective, {**variables, **constants}, t)
        return found.total, found.criterion

    one = torch.func.grad_and_value(value, has_aux=True)
    call = one if candidates is None else torch.func.vmap(one, in_dims=(0, None, None))

    def slope(variables: Variables, constants: Variables, t: Tensor) -> Slope:
        plain = {n: v.detach() for n, v in variables.items()}
        with derivative("functional"), torch.no_grad():  # no tape around that of torch.func
            gradients, (total, criterion) = call(plain, dict(constants), t)
        return Slope(
            {n: g.detach() for n, g in gradients.items()}, total.detach(), criterion.detach()
        )

    return slope


def _traced(
    objective: Objective,
    candidates: int | None,
    at: Point,
    *,
    compiled: bool,
) -> Slopes:
    # Brings a system of symbolic algebra: seconds that only a run that traces should wait for.
    from torch.fx.experimental.proxy_tensor import make_fx

    names, fixed = list(at[0]), list(at[1])
    function = _functional(objective, candidates)

    def flat(variables: list[Tensor], constants: list[Tensor], t: Tensor) -> list[Tensor]:
        found = function(
            dict(zip(names, variables, strict=True)), dict(zip(fixed, constants, strict=True)), t
        )
        return [*(found.gradients[n] for n in names), found.total, found.criterion]

    graph = make_fx(flat)([at[0][n].detach() for n in names], [at[1][n] for n in fixed], at[2])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    call: Callable[..., list[Tensor]] = graph
    if compiled:
        call = torch.compile(graph, fullgraph=True, dynamic=False)

    def slope(variables: Variables, constants: Variables, t: Tensor) -> Slope:
        with torch.no_grad():
            found = call([variables[n].detach() for n in names], [constants[n] for n in fixed], t)
        return Slope(dict(zip(names, found, strict=False)), found[-2], found[-1])

    return slope


class Executor:
    """The present way, and what is known of the others.

    Args:
        objective: Of one candidate.
        candidates: R, or None.
        wanted: The execution, or ``auto``.
    """

    def __init__(self, objective: Objective, candidates: int | None, wanted: Execution) -> None:
        if wanted not in EXECUTIONS:
            raise UnknownName("execution", wanted, EXECUTIONS)
        self.objective, self.candidates = objective, candidates
        self.chosen: Execution = "eager"
        self.history: list[str] = []
        """What was tried and chosen, in words."""
        self.evaluations = 0
        self._call = _eager(objective, candidates, "eager")
        self._times: list[float] = []
        self._seen: set[object] = set()
        self._open = wanted == "auto"
        self._named: Execution | None = None if wanted in ("auto", "eager") else wanted

    def __call__(self, variables: Variables, constants: Variables, t: Tensor) -> Slope:
        """The slope by the present way.

        Raises:
            InvalidInput: If a way was named that this objective cannot take.
        """
        if self._named is not None:
            self._take(self._named, (variables, constants, t))
            self._named = None
        self.evaluations += 1
        if not self._open or len(self._times) == TIMED:
            return self._call(variables, constants, t)
        with recorded(self._seen):
            begun = _now(t)
            found = self._call(variables, constants, t)
            self._times.append(_now(t) - begun)
        return found

    def resume(self, execution: Execution, *, undecided: bool) -> None:
        """Go on as a checkpoint says."""
        self._open = self._open and undecided
        self._named = None if execution == "eager" else execution

    def _take(self, execution: Execution, at: Point) -> None:
        begun = time.perf_counter()
        try:
            self._call, _ = self._set_up(execution, at)
        except REFUSALS as problem:
            raise InvalidInput(
                f"This objective cannot be executed {execution!r}: {_first_line(problem)}. "
                "Use execution='auto' or 'eager'."
            ) from problem
        self.chosen = execution
        self.history.append(f"set up in {time.perf_counter() - begun:.1f} s")

    @property
    def open(self) -> bool:
        """Whether a choice is still to be made."""
        return self._open

    def undecided(self) -> bool:
        """Whether another way may now be tried: enough was timed."""
        return self._open and len(self._times) == TIMED

    def decide(self, at: Point, *, left: float, seconds: float | None) -> None:
        """Try what would repay itself, and keep the fastest that agrees with ``eager``.

        Args:
            at: The present point.
            left: Evaluations to come.
            seconds: What is left of the budget, or None.
        """
        self._open = False
        eager = sorted(self._times)[len(self._times) // 2]
        left = left if seconds is None else min(left, seconds / max(eager, 1e-9))
        allowed = float("inf") if seconds is None else AFFORDED * seconds
        known = _KNOWN.setdefault(self._case(at), {})
        exact: Slope | None = None
        best = eager
        for execution in self._ways(at):
            setup, saved = self._expectation(execution, known, eager, best)
            if left * saved <= setup or setup > allowed:
                continue
            try:
                begun = time.perf_counter()
                call, point = self._set_up(execution, at)
                setup = time.perf_counter() - begun
                exact = exact or _eager(self.objective, self.candidates, "eager")(*at)
                apart = difference(point, exact)
                took = min(_timed(call, at) for _ in range(2))
            except REFUSALS as problem:
                known[execution] = Measured(float("inf"), float("inf"))
                self.history.append(f"{execution} refused: {_first_line(problem)}")
                continue
            known[execution] = Measured(setup, took)
            if apart > PARITY.get(exact.total.dtype, 0.0):
                known[execution] = Measured(float("inf"), float("inf"))
                self.history.append(f"{execution} differs from eager by {apart:.0e}; not used")
                continue
            self.history.append(
                f"{execution} takes {took / eager:.2f} of eager, set up in {setup:.1f} s"
            )
            left -= (setup + 2 * took) / best
            allowed -= setup + 2 * took
            if took < best:
                self._call, self.chosen, best = call, execution, took

    def _ways(self, at: Point) -> tuple[Execution, ...]:
        images = any(v.dim() - (self.candidates is not None) == 4 for v in at[0].values())
        several = self.candidates is not None and self.candidates > 1
        return (
            *(("channels_last",) if images and at[2].is_cuda else ()),
            *(("vmap",) if several else ()),
            "traced",
            "compiled",
        )

    def _expectation(
        self, execution: Execution, known: Mapping[Execution, Measured], eager: float, best: float
    ) -> tuple[float, float]:
        """Seconds of set-up, and seconds saved by every evaluation against the best so far."""
        if execution in known:
            setup, took = known[execution]
            return setup, best - took
        seconds, evaluations, share = TRIALS[execution]
        return seconds + evaluations * eager, share * best

    def _case(self, at: Point) -> tuple[object, ...]:
        shapes = tuple((n, tuple(v.shape), v.dtype, str(v.device)) for n, v in at[0].items())
        code = getattr(self.objective, "__qualname__", type(self.objective).__qualname__)
        return code, self.candidates, shapes, frozenset(self._seen), torch.get_num_threads()

    def _set_up(self, execution: Execution, at: Point) -> tuple[Slopes, Slope]:
        """The way, and its first answer, which is part of the set-up: compilers are lazy."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers warn of what parity checks anyway
            call = slopes(execution, self.objective, self.candidates, at)
            return call, call(*at)


REFUSALS = (RuntimeError, TypeError, ValueError, AssertionError)
"""What batching, tracing and compiling raise for an objective that they cannot take. Eager has
computed the same objective at the same point before, so none of these is the objective's own."""


def difference(one: Slope, other: Slope) -> float:
    """Relative Euclidean distance of two gradients over all variables; inf if not finite."""
    names = list(other.gradients)
    gap = sum(float((one.gradients[n] - other.gradients[n]).double().square().sum()) for n in names)
    size = sum(float(other.gradients[n].double().square().sum()) for n in names)
    ratio = (gap / size) ** 0.5 if size > 0 else gap**0.5
    return ratio if ratio == ratio else float("inf")


def _timed(call: Slopes, at: Point) -> float:
    begun = _now(at[2])
    call(*at)
    return _now(at[2]) - begun


def _now(like: Tensor) -> float:
    """The time when all work queued on the device is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
