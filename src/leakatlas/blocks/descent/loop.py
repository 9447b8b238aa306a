"""The loop itself.

A candidate is a mapping of named variables. The objective returns what to minimise and, if that
is something else, the criterion by which the adversary ranks iterates; the best iterate is kept on
the device. With ``candidates=R``, dimension 0 of every variable counts R independent candidates of
one objective: each keeps its own best, and one that turns non-finite is halted while the others go
on. The loop reads values back to the host only every ``report_every`` steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leakatlas import sealed
from leakatlas.blocks.descent import saved
from leakatlas.blocks.descent.execution import Executor
from leakatlas.blocks.descent.objective import Objective, Variables
from leakatlas.blocks.descent.optimizers import Factory
from leakatlas.blocks.descent.steps import Hook, Schedule, Transform
from leakatlas.blocks.watch import Step, Watch
from leakatlas.errors import InvalidParameter

Shared = Callable[[Variables, Step], Mapping[str, Tensor]]
"""``(variables of all candidates, step) -> constants``."""


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
        execution: How slopes were computed, in words.
    """

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    criterion: Tensor
    alive: Tensor
    steps: int
    trace: Tensor
    execution: str = "eager"

    @property
    def trouble(self) -> str:
        """Why nothing was found, in words; empty where some iterate had a finite criterion."""
        return "" if bool(torch.isfinite(self.criterion).any()) else "no objective was ever finite"

    def chosen(self) -> dict[str, Tensor]:
        """The best iterate of the best candidate of R."""
        index = int(self.criterion.argmin())
        return {n: t[index] for n, t in self.best.items()}


def descend(
    objective: Objective,
    start: Variables,
    *,
    optimizer: Factory,
    steps: int,
    watch: Watch,
    candidates: int | None = None,
    shared: Shared | None = None,
    schedule: Schedule | None = None,
    transform: Transform | Mapping[str, Transform] | None = None,
    after: Sequence[Hook] = (),
    done: Callable[[Tensor], bool] | None = None,
    generators: Sequence[torch.Generator] = (),
    report_every: int = 25,
) -> Descended:
    """Minimise ``objective`` from ``start``.

    Args:
        objective: ``(variables, t) -> scalar`` or :class:`~leakatlas.blocks.descent.Value`, of
            one candidate; weights may be functions of t.
        start: Named tensors, each ``(R, ...)`` with candidates; copied.
        optimizer: Moves the named leaves.
        steps: Iterations; a budget may end the loop sooner.
        watch: Budget, progress, execution and checkpoints.
        candidates: R, or None for a single candidate without that dimension.
        shared: Constants that every candidate sees among its variables, computed before each
            step from all candidates: what they agree on, say.
        schedule: ``progress in [0, 1) -> factor`` on the optimizer's learning rates.
        transform: Applied to each variable's gradient, such as
            :func:`~leakatlas.blocks.descent.signed`; or one for each variable that has any.
        after: Hooks after every step, in order: noise, projection.
        done: ``best criterion -> whether to end``, asked at every report.
        generators: Those that hooks draw from; a resumed run goes on with them.
        report_every: Steps between reads of device values by the host.
    """
    if candidates is not None and not optimizer.batches:
        return _one_by_one(
            objective, start, candidates, watch=watch, optimizer=optimizer, steps=steps,
            shared=shared, schedule=schedule, transform=transform, after=after, done=done,
            generators=generators, report_every=report_every,
        )  # fmt: skip
    file = watch.conduct.next_file()
    wanted = saved.identity(start, steps, candidates) if file is not None else ""

    def fresh() -> _Run:
        return _Run(objective, start, optimizer, candidates, transform, watch)

    run, state = _resumed(fresh, file, wanted, generators, start, candidates)
    first = 0 if state is None else state["steps"]
    if state is not None and state["finished"]:
        return run.end(first)
    now = Step(first - 1, max(first - 1, 0) / steps)
    begun = kept = time.perf_counter()
    settled = False
    for now in watch.steps(steps, first=first, stretches=True):
        factor = 1.0 if schedule is None else schedule(now.progress)
        for group, lr in zip(run.engine.param_groups, run.rates, strict=True):
            group["lr"] = lr * factor
        run.now(now, shared)
        run.asked = 0
        try:
            run.engine.step(run.closure)
        except KeyboardInterrupt:  # the best so far is whole; the last checkpoint stands
            watch.interrupt()
            file = None
            break
        except _OutOfTime:  # in the middle of a step; the last checkpoint stands
            watch.cut()
            file = None
            break
        with torch.no_grad():
            for hook in after:
                hook(run.leaves, {n: lr * factor for n, lr in run.rate_of.items()}, now)
        if run.executor.undecided():
            per_step = run.executor.evaluations / (now.index + 1 - first)
            run.decide(left=(steps - now.index - 1) * per_step, seconds=watch.remaining())
        if (now.index + 1) % report_every == 0:
            run.halt()
            lowest, alive = run.report()
            rate = (now.index + 1 - first) / max(time.perf_counter() - begun, 1e-9)
            run.tell(lowest, rate, steps - now.index - 1)
            if not bool(alive.any()) or (done is not None and done(lowest)):
                settled = True
                break
            if file is not None and time.perf_counter() - kept > watch.conduct.save_every:
                kept = time.perf_counter()
                saved.save(file, run.state(wanted, now.index + 1, finished=False), generators)
    finished = settled or now.index + 1 >= steps
    if file is not None and not finished:  # stopped, or out of time: more time goes on from here
        saved.save(file, run.state(wanted, now.index + 1, finished=False), generators)
    run.halt()
    run.now(now, shared)
    run.evaluate()
    run.report()
    if file is not None and finished:
        saved.save(file, run.state(wanted, now.index + 1, finished=True), generators)
    watch.conduct.executions.append(run.describe())
    return run.end(now.index + 1)


def _resumed(
    fresh: Callable[[], _Run],
    file: Path | None,
    wanted: str,
    generators: Sequence[torch.Generator],
    start: Variables,
    candidates: int | None,
) -> tuple[_Run, Mapping[str, Any] | None]:
    """A run, and the checkpoint in ``file`` that it goes on from, if there is one that fits."""
    run = fresh()
    state = None if file is None else saved.load(file, wanted, generators, start, candidates)
    if file is None or state is None:
        return run, None
    try:
        run.restore(state)
    except sealed.MALFORMED:
        sealed.discard(file, "its optimizer's part is of another optimizer")
        return fresh(), None
    return run, state


class _OutOfTime(Exception):
    """The budget ended within a step; one of L-BFGS evaluates some twenty times."""


class _Run:
    """The state of one descent: leaves, optimizer, best iterates and who is alive."""

    def __init__(
        self,
        objective: Objective,
        start: Variables,
        optimizer: Factory,
        candidates: int | None,
        transform: Transform | Mapping[str, Transform] | None,
        watch: Watch,
    ) -> None:
        self.leaves = {n: t.detach().clone() for n, t in start.items()}
        self.engine = optimizer.make(self.leaves, candidates)
        self.rates = [float(group["lr"]) for group in self.engine.param_groups]
        self.rate_of = self._rate_of()
        """The learning rate of each variable, before the schedule."""
        self.executor = Executor(objective, candidates, watch.conduct.execution)
        self.transforms = _by_name(transform, self.leaves)
        self.watch = watch
        self.asked = 0
        """Evaluations that the optimizer asked for in the present step."""
        like = next(iter(self.leaves.values()))
        shape = () if candidates is None else (candidates,)
        self.best = {n: t.clone() for n, t in self.leaves.items()}
        self.lowest = torch.full(shape, math.inf, dtype=like.dtype, device=like.device)
        self.alive = torch.ones(shape, dtype=torch.bool, device=like.device)
        self.trace: list[Tensor] = []
        self.t = torch.zeros((), dtype=like.dtype, device=like.device)
        self.constants: Variables = {}

    def _rate_of(self) -> dict[str, float]:
        names = {id(leaf): name for name, leaf in self.leaves.items()}
        found: dict[str, float] = {}
        for group, lr in zip(self.engine.param_groups, self.rates, strict=True):
            # An optimizer of our own moves all variables at one rate and lists none.
            for leaf in group.get("params", self.leaves.values()):
                found[names[id(leaf)]] = lr
        return found

    def now(self, step: Step, shared: Shared | None) -> None:
        """Set the time, and what the candidates agree on."""
        self.t.fill_(step.progress)
        if shared is not None:
            with torch.no_grad():
                self.constants = shared(self.leaves, step)

    def evaluate(self) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients and totals at the leaves; keeps what is better than before."""
        gradients, total, criterion = self.executor(self.leaves, self.constants, self.t)
        self.alive &= torch.isfinite(criterion)
        better = self.alive & (criterion < self.lowest)
        self.lowest = torch.where(better, criterion, self.lowest)
        self.best = {
            n: torch.where(_rows(better, leaf), leaf, self.best[n])
            for n, leaf in self.leaves.items()
        }
        return gradients, total

    def closure(self) -> Tensor:
        """What an optimizer asks for: gradients in place, the sum of totals returned.

        Raises:
            _OutOfTime: If the step has had an evaluation already and the budget is over.
        """
        if self.asked and (self.watch.remaining() or 1.0) <= 0:
            raise _OutOfTime
        self.asked += 1
        gradients, total = self.evaluate()
        for name, leaf in self.leaves.items():
            step = gradients[name]
            step = self.transforms[name](step) if name in self.transforms else step
            # Optimizers take it apart; channels-last layers would give it another layout.
            leaf.grad = torch.where(_rows(self.alive, leaf), step, 0.0).contiguous()
        return total.sum()

    @torch.no_grad()
    def halt(self) -> None:
        """Put candidates that are no longer finite back to their best, and mark them.

        Between reports a broken candidate is only held still: its gradient is set to zero.
        """
        for leaf in self.leaves.values():
            finite = torch.isfinite(leaf)
            rows = finite.reshape(len(self.alive), -1) if self.alive.dim() else finite
            held = rows.all(1) if self.alive.dim() else rows.all()
            self.alive = self.alive & held
        for name, leaf in self.leaves.items():
            leaf.copy_(torch.where(_rows(self.alive, leaf), leaf, self.best[name]))

    def decide(self, *, left: float, seconds: float | None) -> None:
        """Choose how slopes are computed from now on."""
        self.executor.decide((self.leaves, self.constants, self.t), left=left, seconds=seconds)

    def leading(self, name: str) -> Tensor:
        """One variable of the candidate whose criterion is lowest so far."""
        best = self.best[name]
        return best if self.lowest.dim() == 0 else best[int(self.lowest.argmin())]

    def report(self) -> tuple[Tensor, Tensor]:
        """The best criteria so far and who is alive; noted in the trace."""
        self.trace.append(self.lowest)
        return self.lowest, self.alive

    def tell(self, lowest: Tensor, rate: float, left: int) -> None:
        """Show listeners how far it is, and the trail of this run its leading image."""
        if self.watch.listen is not None:
            self.watch.note = self.note(lowest, rate, left, self.watch.remaining())
        if self.watch.conduct.trail is not None and "x" in self.best:
            self.watch.conduct.trail.add(self.leading("x"))

    def note(self, lowest: Tensor, rate: float, left: int, seconds: float | None) -> str:
        """Criterion, speed and time to come, for people."""
        wait = left / rate if seconds is None else min(left / rate, max(seconds, 0.0))
        how = "" if self.executor.chosen == "eager" else f", {self.executor.chosen}"
        return f"criterion {float(lowest.min()):.3g}, {rate:.3g} it/s{how}, {wait:.0f} s left"

    def describe(self) -> str:
        """How slopes were computed."""
        return "; ".join([self.executor.chosen, *self.executor.history])

    def state(self, identity: str, steps: int, *, finished: bool) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "identity": identity,
            "steps": steps,
            "finished": finished,
            "leaves": self.leaves,
            "best": self.best,
            "lowest": self.lowest,
            "alive": self.alive,
            "trace": self.trace,
            "optimizer": self.engine.state_dict(),
            "execution": self.executor.chosen,
            "undecided": self.executor.open,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name, leaf in self.leaves.items():
            leaf.copy_(state["leaves"][name])
        self.best = dict(state["best"])
        self.lowest, self.alive = state["lowest"], state["alive"]
        self.trace = list(state["trace"])
        self.engine.load_state_dict(state["optimizer"])
        self.executor.resume(state["execution"], undecided=state["undecided"])

    def end(self, steps: int) -> Descended:
        """The result."""
        last = {n: leaf.detach().clone() for n, leaf in self.leaves.items()}
        trace = torch.stack(self.trace)
        return Descended(self.best, last, self.lowest, self.alive, steps, trace, self.describe())


def _one_by_one(
    objective: Objective,
    start: Variables,
    candidates: int,
    *,
    watch: Watch,
    done: Callable[[Tensor], bool] | None,
    **rest: Any,
) -> Descended:
    """Candidates whose optimizer cannot take them together; ``done`` also spares the later ones."""
    ended: list[Descended] = []
    for index, share in zip(range(candidates), watch.share(candidates), strict=False):
        one = {n: t[index] for n, t in start.items()}
        ended.append(descend(objective, one, watch=share, done=done, **rest))
        if done is not None and done(ended[-1].criterion):
            break
    begun = len(ended)
    like = ended[0].criterion

    def stacked(values: Iterable[Tensor], fill: Tensor) -> Tensor:
        return torch.cat([torch.stack(list(values)), fill])

    rows = {n: t[begun:].detach().clone() for n, t in start.items()}
    idle = like.new_full((candidates - begun,), math.inf)
    longest = max(len(one.trace) for one in ended)
    traces = torch.stack(
        [torch.cat([e.trace, e.trace[-1:].expand(longest - len(e.trace))]) for e in ended], dim=1
    )
    return Descended(
        {n: stacked((e.best[n] for e in ended), rows[n]) for n in start},
        {n: stacked((e.last[n] for e in ended), rows[n]) for n in start},
        stacked((e.criterion for e in ended), idle),
        stacked((e.alive for e in ended), torch.ones_like(idle, dtype=torch.bool)),
        sum(e.steps for e in ended),
        torch.cat([traces, idle.expand(longest, -1)], dim=1),
        ended[-1].execution,
    )


def _by_name(
    transform: Transform | Mapping[str, Transform] | None, variables: Variables
) -> Mapping[str, Transform]:
    """The transform of every variable that has one.

    Raises:
        InvalidParameter: If one is named for something that is no variable.
    """
    if transform is None:
        return {}
    if not isinstance(transform, Mapping):
        return dict.fromkeys(variables, transform)
    if not transform.keys() <= variables.keys():
        raise InvalidParameter(
            f"Transforms are given for {', '.join(transform)}; the variables are "
            f"{', '.join(variables)}."
        )
    return transform


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """A per-candidate mask, shaped to select whole candidates of ``like``."""
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))
