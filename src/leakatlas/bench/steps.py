"""The engine under the optimisation attacks: time and memory of one iteration.

``steps``: an iteration of every execution over one of a loop written by hand here; both take turns
within one process, so that a busy machine slows both. ``rival``: breaching's iteration over the
bare loop's, each alone. ``unroll``: the FedAVG replay that keeps its graph against the one that
recomputes it. Memory is what torch allocates at once for one slope. (``curves`` are plain cases:
every record keeps the quality of its iterates over time.)
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.bench import meter, rival, scene
from leakatlas.bench.cells import Cell
from leakatlas.bench.schema import OwnMeasure
from leakatlas.blocks import descent, matching, priors
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.fl import FedAVG, replay

LR = TV = 0.1
"""Step size and prior weight of the timed loops: those of the published preset."""

WARM_UP, SECONDS = 5, 8.0
"""Iterations that do not count, and about how long each execution of a case is timed."""

MIB = 2**20
Figures = dict[str, float]


def measure(cell: Cell) -> Figures:
    """What the name of the case begins with."""
    given = Problem(cell)
    return {"steps": steps, "rival": beside, "unroll": unroll}[cell.label.partition("/")[0]](given)


class Problem:
    """Model, update and starts of a case, and the loop that a careful author writes by hand."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.stage = cell, scene.staged(cell)
        self.view = self.stage.view([self.stage.federation.play_round()])
        self.protocol, self.box = self.stage.scenario.protocol, self.stage.box
        self.model, self.y = self.view.model.train(self.protocol.mode == "train"), self.view.labels
        self.g = dict(self.view.update.tensors)
        self.candidates = 8 if cell.label.endswith("8 restarts") else 1
        generator = torch.Generator().manual_seed(cell.seed)
        self.start = torch.randn(self.candidates, *self.view.batch_shape, generator=generator)
        self.starts = [start.clone().requires_grad_() for start in self.start]
        self.adams = [torch.optim.Adam([start], lr=LR) for start in self.starts]
        self.best = [(float("inf"), start.detach()) for start in self.starts]
        self.size = torch.stack([t.square().sum() for t in self.g.values()]).sum().sqrt()

    def objective(self) -> descent.Objective:
        """What the attack minimises, through the replay of its view."""
        play = self.view.replayer()

        def value(variables: descent.Variables, t: Tensor) -> descent.Value:
            match = matching.cosine(play(variables["x"], self.y), self.g)
            return descent.Value(match + TV * priors.tv_mean(variables["x"]), match)

        return value

    def step(self) -> None:
        """One iteration of every start by hand."""
        low, high = self.box.bounds(self.start)
        for index, (x, adam) in enumerate(zip(self.starts, self.adams, strict=True)):
            found = self._sent(x)
            inner = torch.stack(
                [(a * b).sum() for a, b in zip(found, self.g.values(), strict=True)]
            ).sum()
            norm = torch.stack([a.square().sum() for a in found]).sum().sqrt()
            match = 1 - inner / (norm * self.size)
            across = (x[..., :, 1:] - x[..., :, :-1]).abs().mean()
            down = (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
            (slope,) = torch.autograd.grad(match + TV * (across + down), x)
            x.grad = slope.sign()
            if float(match.detach()) < self.best[index][0]:
                self.best[index] = (float(match.detach()), x.detach().clone())
            adam.step()
            with torch.no_grad():
                x.clamp_(low, high)

    def _sent(self, x: Tensor) -> list[Tensor]:
        parameters = list(self.model.parameters())
        if not isinstance(self.protocol, FedAVG):
            loss = F.cross_entropy(self.model(x), self.y)
            return list(torch.autograd.grad(loss, parameters, create_graph=True))
        current: list[Tensor] = list(parameters)
        for _ in range(self.protocol.epochs):
            for batch in torch.arange(len(x)).split(self.protocol.batch_size):
                state = dict(zip(self.g, current, strict=True))
                logits = torch.func.functional_call(self.model, state, (x[batch],))
                loss = F.cross_entropy(logits, self.y[batch])
                slopes = torch.autograd.grad(loss, current, create_graph=True)
                current = [p - self.protocol.lr * d for p, d in zip(current, slopes, strict=True)]
        return [after - before for after, before in zip(current, parameters, strict=True)]

    def alone(self) -> tuple[float, int]:
        """Median seconds of an iteration by hand, undisturbed, and of how many."""
        seconds: list[float] = []
        while len(seconds) < WARM_UP + 3 or (sum(seconds) < SECONDS / 2 and len(seconds) < 200):
            seconds.append(meter.least(self.step, 1))
        return statistics.median(seconds[WARM_UP:]), len(seconds)


def steps(given: Problem) -> Figures:
    """Time and memory of every execution that the case names."""
    once, count = given.alone()
    found = {"bare loop, ms": 1e3 * once}
    for name in [m.name for m in given.cell.case.measures if isinstance(m, OwnMeasure)]:
        what, _, way = name.partition(", ")
        if what == "time":
            found |= _in_turns(Problem(given.cell), way, count)
        elif what == "peak memory":
            call = given.step if way == "bare" else _slope(given, way)
            found[name] = meter.allocated(call).most / MIB
    return found


def _slope(given: Problem, way: str) -> Callable[[], object]:
    at: tuple[descent.Variables, descent.Variables, Tensor]
    at = ({"x": given.start}, {}, torch.zeros(()))
    made = descent.slopes(way, given.objective(), given.candidates, at)  # type: ignore[arg-type]
    return functools.partial(made, *at)


def _in_turns(given: Problem, way: str, count: int) -> Figures:
    """After each step of the engine, the bare loop makes one of its own."""
    engine: list[float] = []
    ratios: list[float] = []
    left = [time.perf_counter()]

    def turn(variables: descent.Variables, rates: object, step: object) -> None:
        entered = time.perf_counter()
        engine.append(entered - left[0])
        with torch.enable_grad():  # hooks run without a tape
            given.step()
        left[0] = time.perf_counter()
        ratios.append(engine[-1] / (left[0] - entered))

    descent.descend(
        given.objective(), {"x": given.start}, candidates=given.candidates,
        optimizer=descent.adam(LR), steps=count,
        watch=Watch(conduct=Conduct(execution=way)),  # type: ignore[arg-type]  # named by the study
        transform=descent.signed, after=(descent.inside(given.box, "x"), turn),
    )  # fmt: skip
    set_up = engine[0] - statistics.median(engine[WARM_UP:])
    ratio = statistics.median(ratios[WARM_UP:])
    return {f"time, {way}": ratio, f"set-up, {way}": max(set_up, 0.0)}


def beside(given: Problem) -> Figures:
    """Run breaching on the same problem, right after the bare loop."""
    once, count = given.alone()
    problem = rival.Problem(stage=given.stage, view=given.view, starts=given.start, tv_weight=TV)
    (found,) = rival.ask([problem], steps=count + 20)
    return {
        "bare loop, ms": 1e3 * once,
        "time, breaching": found.seconds_per_iteration * given.candidates / once,
    }


def unroll(given: Problem) -> Figures:
    """CPU time and memory of one slope through all local steps."""
    parameters = {n: p.detach() for n, p in given.model.named_parameters()}
    model, protocol, found = replay.without_running_statistics(given.model), given.protocol, {}
    assert isinstance(protocol, FedAVG)
    for kept, again in (("graph", False), ("weights", True)):

        def slope(again: bool = again) -> None:
            x = given.start[0].clone().requires_grad_()
            sent = replay.unroll(model, parameters, {}, x, given.y, protocol, checkpoint=again)
            torch.autograd.grad(matching.cosine(sent, given.g), x)

        found[f"{kept} kept, s"] = meter.least(slope, clock=time.process_time)
        found[f"{kept} kept, MB"] = meter.allocated(slope).most / MIB
    return found | {
        "time, weights over graph": found["weights kept, s"] / found["graph kept, s"],
        "memory, weights over graph": found["weights kept, MB"] / found["graph kept, MB"],
    }
