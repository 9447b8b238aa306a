"""The engine under the optimisation attacks: time, memory, and quality against time.

``steps``: an iteration of every execution over one of a loop written by hand here; both take turns
within one process, so that a busy machine slows both. ``rival``: breaching's iteration over the
bare loop's, each alone; it runs in a Python of its own, which ``$LEAKATLAS_RIVAL`` names.
``unroll``: the FedAVG replay that keeps its graph against the one that recomputes it. ``curves``:
PSNR of the best iterate at shares of the CPU time that the published preset takes. Peak memory is
measured in processes of their own.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness, scene
from leakatlas.bench.cells import Cell
from leakatlas.blocks import descent, matching, priors
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.data import CIFAR10
from leakatlas.errors import Unavailable
from leakatlas.fl import FedAVG, replay
from leakatlas.fl.view import protocol_from_json
from leakatlas.metrics.images import psnr

RIVAL = Path(__file__).parents[2] / "benchmarks" / "rival.py"
LR = TV = 0.1
"""Step size and prior weight of the timed loops: those of the published preset."""

WARM_UP = 5
SECONDS = 8.0
"""About how long each execution of a case is timed."""

SHARES = (5, 10, 15, 20, 25, 50, 100)
Figures = dict[str, float]


def measure(cell: Cell) -> Figures:
    """What the name of the case begins with."""
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Cell], Figures]] = {
        "steps": steps, "rival": rival, "unroll": unroll, "curves": curves
    }  # fmt: skip
    return parts[cell.label.partition("/")[0]](cell)


class Problem:
    """Model, update and starts of a case, and the loop that a careful author writes by hand."""

    def __init__(self, cell: Cell) -> None:
        self.protocol = protocol_from_json(cell.case.protocol)
        self.candidates = 8 if cell.label.endswith("8 restarts") else 1
        victims = scene.victims(cell)
        self.model = scene.network(cell)[1].train(self.protocol.mode == "train")
        self.x, self.y = CIFAR10.normalize(victims.images), victims.labels
        held = {n: p.detach() for n, p in self.model.named_parameters()}
        buffers = {n: b.detach() for n, b in self.model.named_buffers()}
        sent = replay.simulate_client(self.model, held, buffers, self.x, self.y, self.protocol)
        self.g = {n: t.detach() for n, t in sent.items()}
        generator = torch.Generator().manual_seed(cell.seed)
        self.start = torch.randn(self.candidates, *self.x.shape, generator=generator)
        self.low, self.high = CIFAR10.bounds(self.start)
        self.starts = [start.clone().requires_grad_() for start in self.start]
        self.adams = [torch.optim.Adam([start], lr=LR) for start in self.starts]
        self.best = [(float("inf"), start.detach()) for start in self.starts]
        self.size = torch.stack([t.square().sum() for t in self.g.values()]).sum().sqrt()

    def objective(self) -> descent.Objective:
        """What the attack minimises, through the replay that views use."""
        model = replay.without_running_statistics(copy.deepcopy(self.model))
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

        def value(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            sent = replay.simulate_client(
                model, parameters, buffers, x, self.y, self.protocol, own=True
            )
            match = matching.cosine(sent, self.g)
            return descent.Value(match + TV * priors.tv_mean(x), match)

        return value

    def step(self) -> None:
        """One iteration of every start by hand."""
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
                x.clamp_(self.low, self.high)

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
            begun = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[WARM_UP:]), len(seconds)


def steps(cell: Cell) -> Figures:
    """Every execution that the case names; names that its set-up cannot have are left out."""
    once, count = Problem(cell).alone()
    found = {"bare loop, ms": 1e3 * once}
    for m in cell.case.measures:
        name = m if isinstance(m, str) else m.name
        what, _, way = name.partition(", ")
        if what == "peak memory":
            found[name] = _apart(cell, way)[0]
        elif what == "time":
            found |= _in_turns(Problem(cell), way, count)
    return found


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
        transform=descent.signed, after=(descent.inside(CIFAR10, "x"), turn),
    )  # fmt: skip
    steady = statistics.median(engine[WARM_UP:])
    return {
        f"time, {way}": statistics.median(ratios[WARM_UP:]),
        f"set-up, {way}": max(engine[0] - steady, 0.0),
    }


def unroll(cell: Cell) -> Figures:
    """Time and memory of one slope through all local steps."""
    kept, again = _apart(cell, "graph"), _apart(cell, "weights")
    return {
        "graph kept, s": kept[1], "graph kept, MB": kept[0],
        "weights kept, s": again[1], "weights kept, MB": again[0],
        "time, weights over graph": again[1] / kept[1],
        "memory, weights over graph": again[0] / kept[0],
    }  # fmt: skip


def _apart(cell: Cell, way: str) -> tuple[float, float]:
    """Growth of the peak in MB, and seconds, of a few slopes in a process of their own."""
    command = [sys.executable, __file__, json.dumps(cell.to_json()), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, seconds = map(float, done.stdout.split()[-2:])
    return grown, seconds


def _few_slopes(cell: Cell, way: str) -> tuple[float, float]:
    given = Problem(cell)
    at: tuple[descent.Variables, descent.Variables, Tensor]
    at = ({"x": given.start}, {}, torch.zeros(()))
    parameters = {n: p.detach() for n, p in given.model.named_parameters()}
    replay.without_running_statistics(given.model)

    def slope() -> None:
        leaf = given.x.clone().requires_grad_()
        sent = replay.unroll(
            given.model, parameters, {}, leaf, given.y, given.protocol,  # type: ignore[arg-type]
            checkpoint=way == "weights",
        )  # fmt: skip
        torch.autograd.grad(matching.cosine(sent, given.g), leaf)

    call: Callable[[], object] = slope
    if way == "bare":
        call = given.step
    elif way not in ("graph", "weights"):
        made = descent.slopes(way, given.objective(), given.candidates, at)  # type: ignore[arg-type]
        call = lambda: made(*at)  # noqa: E731
    before, seconds = _high_water(), []
    for _ in range(3):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return _high_water() - before, min(seconds)


def _high_water() -> float:
    """Peak resident MB of this process; ``ru_maxrss`` would count its parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def rival(cell: Cell) -> Figures:
    """Run breaching on the same problem, right after the bare loop."""
    given = Problem(cell)
    once, count = given.alone()
    found = _breaching(cell, given, count + 20)
    grown = found["peak_bytes"] - found["peak_bytes_before"]
    return {
        "bare loop, ms": 1e3 * once,
        "time, breaching": found["seconds_per_iteration"] * given.candidates / once,
        "peak memory, breaching": grown / 2**20,
    }


def _breaching(cell: Cell, given: Problem, count: int) -> dict[str, float]:
    python = os.environ.get("LEAKATLAS_RIVAL")
    if python is None:
        raise Unavailable(
            "breaching runs in a Python of its own: install the extra 'bench' into one and name it "
            "in $LEAKATLAS_RIVAL."
        )
    tensors: dict[str, Tensor] = {"x": given.x, "y": given.y, "start": given.start}
    for kind, held in (
        ("parameter", dict(given.model.named_parameters())),
        ("buffer", dict(given.model.named_buffers())), ("update", given.g),
    ):  # fmt: skip
        tensors |= {f"{kind}/{name}": tensor.detach() for name, tensor in held.items()}
    protocol, local = given.protocol, None
    if isinstance(protocol, FedAVG):
        each = -(-len(given.x) // protocol.batch_size)
        local = {"lr": protocol.lr, "batch_size": protocol.batch_size,
                 "steps": protocol.epochs * each}  # fmt: skip
    reference = scene.network(cell)[0]
    with tempfile.TemporaryDirectory() as folder:
        file, job, out = (Path(folder) / n for n in ("t.safetensors", "job.json", "out.json"))
        save_file({n: t.clone().contiguous() for n, t in tensors.items()}, file)
        asked = {
            "case": cell.label, "batch": len(given.x), "restarts": given.candidates,
            "steps": count, "seed": cell.seed, "tensors": str(file), "mean": list(CIFAR10.mean),
            "std": list(CIFAR10.std), "fedavg": local, "tv_weight": TV,
            "model": {"name": reference.name, "kwargs": dict(reference.kwargs)},
        }  # fmt: skip
        job.write_text(json.dumps(asked), encoding="utf-8")
        subprocess.run([python, str(RIVAL), str(job), str(out)], check=True, capture_output=True)
        answer: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    if "skipped" in answer:
        raise Unavailable(str(answer["skipped"]))
    return answer


def curves(cell: Cell) -> Figures:
    """Both presets on one problem, read at shares of the published one's time."""
    deep = {"distance": "cosine", "tv_weight": 0.03} if "resnet" in cell.label else {}
    tuned = InvertingGradients.tuned(steps=350, **deep)
    held = {"published": _curve(cell, InvertingGradients(steps=2_000)),
            "tuned": _curve(cell, tuned)}  # fmt: skip
    whole = held["published"][-1][0]
    found = {"time, tuned over published": held["tuned"][-1][0] / whole, "published, s": whole}
    for preset, points in held.items():
        for share in SHARES:
            reached = [score for seconds, score in points if seconds <= share / 100 * whole]
            found[f"{preset} at {share} %"] = reached[-1] if reached else points[0][1]
        found[f"{preset}, final"] = points[-1][1]
    return found


def _curve(cell: Cell, attack: InvertingGradients) -> list[tuple[float, float]]:
    """CPU seconds, and PSNR of the best iterate so far; scored after the clock has stopped."""
    stage = scene.staged(cell)
    view, records = harness.observe(stage, attack)
    truth = harness.truth_of(stage, 0, records)
    kept: list[tuple[float, Tensor]] = []
    # A process's first optimizer imports torch's compiler, for seconds.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    begun = time.process_time()

    def keep(best: Mapping[str, Tensor]) -> None:
        kept.append((time.process_time() - begun, best["x"][0]))

    found = attack(view, seed=cell.seed, watch=Watch(conduct=Conduct(execution="eager", keep=keep)))
    kept.append((time.process_time() - begun, found.images))
    order = [int((found.labels == label).nonzero()[0]) for label in truth.labels]  # distinct
    return [
        (seconds, float(psnr(stage.box.denormalize(x[order]).clamp(0, 1), truth.images).mean()))
        for seconds, x in kept
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*_few_slopes(Cell.from_json(json.loads(sys.argv[1])), sys.argv[2]))
