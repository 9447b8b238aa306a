"""Measures the engine: time, memory and quality against a bare loop and against ``breaching``.

    python benchmarks/descent.py [steps] [unroll] [quality] [--data CIFAR10_FOLDER] [--rival PYTHON]

``steps``: milliseconds of an iteration, every execution against a loop written by hand in this
file, taken in turns within one process, so that a busy machine slows both; set-up costs; peak
memory, each in a process of its own; and the rival on the same problem. ``unroll``: time and peak
memory of the FedAVG replay against the number of local steps, with and without its graph.
``quality``: PSNR against time of Inverting Gradients, published preset, ours and the rival's, on
test images; ours was chosen on train images.

Each writes ``results/descent/<name>.json``. ``--rival`` names a Python that has the extra
``bench``; without breaching the rival's figures are left out, which the output says. Times are of
one thread.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import models
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.blocks import descent, matching, priors
from leakatlas.blocks.watch import Conduct, Execution, Watch
from leakatlas.data import CIFAR10, ImageSet, parquet
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Scenario, replay, stage, stream
from leakatlas.metrics import psnr
from leakatlas.metrics.intervals import bootstrap
from leakatlas.threat import Grant

ROOT = Path(__file__).resolve().parents[1]
LR, TV = 0.1, 0.1
"""Step size and prior weight of the timed loops: those of the published preset."""

WARM_UP = 5
SECONDS = 8.0
"""About how long each execution of a case is timed."""


@dataclass(frozen=True)
class Case:
    """One problem."""

    model: str
    batch: int = 1
    candidates: int = 1
    protocol: Protocol = field(default_factory=lambda: FedSGD(mode="eval"))
    settings: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "lenet": Case("lenet"),
    "lenet, 8 restarts": Case("lenet", candidates=8),
    "convnet": Case("convnet"),
    "convnet, batch 8": Case("convnet", batch=8),
    "resnet18": Case("resnet18"),
    "resnet18, batch 8": Case("resnet18", batch=8),
    "convnet, 10 local steps": Case(
        "convnet", batch=4, protocol=FedAVG(epochs=5, batch_size=2, lr=0.01, mode="eval")
    ),
    "vit": Case("vit"),
}
WAYS: tuple[Execution, ...] = ("eager", "vmap", "traced", "compiled", "finite")


@dataclass(frozen=True)
class Problem:
    """A case with images, weights, update and starts."""

    case: Case
    model: nn.Module
    x: Tensor
    y: Tensor
    g: dict[str, Tensor]
    start: Tensor

    def objective(self) -> descent.Objective:
        """What the attack [3] minimises, through the replay that views use."""
        model = replay.without_running_statistics(copy.deepcopy(self.model))
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

        def value(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            sent = replay.simulate_client(
                model, parameters, buffers, x, self.y, self.case.protocol, own=True
            )
            match = matching.cosine(sent, self.g)
            return descent.Value(match + TV * priors.tv_mean(x), match)

        return value


def problem(case: Case, images: ImageSet) -> Problem:
    """Fresh weights of seed 0, the first images of distinct labels."""
    model = models.build(case.model, classes=10, seed=0, **case.settings)
    model.train(case.protocol.mode == "train")
    chosen = distinct(images, case.batch)
    x, y = CIFAR10.normalize(images.images[chosen]), images.labels[chosen]
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    sent = replay.simulate_client(model, parameters, buffers, x, y, case.protocol)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(case.candidates, *x.shape, generator=generator)
    return Problem(case, model, x, y, {n: t.detach() for n, t in sent.items()}, start)


def distinct(images: ImageSet, count: int, *, skip: int = 0) -> list[int]:
    """The first ``count`` images of distinct labels from number ``skip`` on."""
    seen: list[int] = []
    chosen: list[int] = []
    for index in range(skip, len(images)):
        label = int(images.labels[index])
        if label not in seen and len(chosen) < count:
            seen.append(label)
            chosen.append(index)
    return chosen


# -- the loop written by hand ----------------------------------------------------------------------


class BareLoop:
    """What a careful author writes without any framework: the tape, Adam, one start at a time."""

    def __init__(self, given: Problem) -> None:
        self.given = given
        self.parameters = list(given.model.parameters())
        self.g = [given.g[n] for n, _ in given.model.named_parameters()]
        self.size = torch.stack([t.square().sum() for t in self.g]).sum().sqrt()
        self.low, self.high = CIFAR10.bounds(given.start)
        self.starts = [start.clone().requires_grad_() for start in given.start]
        self.adams = [torch.optim.Adam([start], lr=LR) for start in self.starts]
        self.best = [(float("inf"), start.detach()) for start in self.starts]

    def step(self) -> None:
        """One iteration of every start."""
        for index, (x, adam) in enumerate(zip(self.starts, self.adams, strict=True)):
            found = self.sent(x)
            inner = torch.stack([(a * b).sum() for a, b in zip(found, self.g, strict=True)]).sum()
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

    def sent(self, x: Tensor) -> list[Tensor]:
        """The client's gradient, or its weight change after local steps."""
        model, y, protocol = self.given.model, self.given.y, self.given.case.protocol
        if not isinstance(protocol, FedAVG):
            loss = F.cross_entropy(model(x), y)
            return list(torch.autograd.grad(loss, self.parameters, create_graph=True))
        names = [n for n, _ in model.named_parameters()]
        current: list[Tensor] = list(self.parameters)
        for _ in range(protocol.epochs):
            for batch in torch.arange(len(x)).split(protocol.batch_size):
                state = dict(zip(names, current, strict=True))
                logits = torch.func.functional_call(model, state, (x[batch],))
                loss = F.cross_entropy(logits, y[batch])
                slopes = torch.autograd.grad(loss, current, create_graph=True)
                current = [p - protocol.lr * d for p, d in zip(current, slopes, strict=True)]
        return [after - before for after, before in zip(current, self.parameters, strict=True)]


# -- milliseconds of an iteration ------------------------------------------------------------------


def in_turns(given: Problem, way: Execution, steps: int) -> tuple[list[float], list[float], float]:
    """Seconds of every iteration of the engine and of the bare loop, and seconds of set-up.

    After each step of the engine, the bare loop makes one of its own.
    """
    bare = BareLoop(given)
    engine: list[float] = []
    by_hand: list[float] = []
    left = [time.perf_counter()]

    def turn(variables: descent.Variables, rates: object, step: object) -> None:
        entered = time.perf_counter()
        engine.append(entered - left[0])
        with torch.enable_grad():  # hooks run without a tape
            bare.step()
        left[0] = time.perf_counter()
        by_hand.append(left[0] - entered)

    descent.descend(
        given.objective(),
        {"x": given.start},
        candidates=given.case.candidates,
        optimizer=descent.adam(LR),
        steps=steps,
        watch=Watch(conduct=Conduct(execution=way)),
        transform=descent.signed,
        after=(descent.inside(CIFAR10, "x"), turn),
    )
    return engine[WARM_UP:], by_hand[WARM_UP:], engine[0] - statistics.median(engine[WARM_UP:])


def steps(
    images: ImageSet, rival: str | None, only: Sequence[str] | None, ways: Sequence[Execution]
) -> None:
    """Executions of every case, and the rival; what is not asked for keeps its stored figures."""
    measures: list[dict[str, Any]] = []
    for name, case in CASES.items():
        if only and name not in only:
            continue
        given = problem(case, images)
        bare = BareLoop(given)
        bare.step()
        begun = time.perf_counter()
        bare.step()
        once = time.perf_counter() - begun
        count = min(max(int(SECONDS / (2 * once)), 8), 200) + WARM_UP
        for way in ways:
            if (way == "vmap" and case.candidates == 1) or (
                way == "finite" and isinstance(case.protocol, FedAVG)
            ):
                continue
            engine, by_hand, setup = in_turns(given, way, count)
            ratios = torch.tensor(engine) / torch.tensor(by_hand)
            low, high = interval_of_median(ratios, f"{name} {way}")
            note = f"{1e3 * statistics.median(engine):.2f} ms; median of paired ratios"
            measures.append(
                measure(f"{name}: {way} / bare loop", float(ratios.median()), "", (low, high),
                        len(engine), note)
            )  # fmt: skip
            if way in ("vmap", "traced", "compiled"):
                measures.append(measure(f"{name}: set-up of {way}", max(setup, 0.0), "s", None, 1))
            say(measures[-2 if way in ("vmap", "traced", "compiled") else -1])
        milliseconds = 1e3 * alone(given, count)
        measures.append(measure(f"{name}: bare loop", milliseconds, "ms", None, count,
                                "median of an iteration of all starts, alone"))  # fmt: skip
        for how in ("bare", "eager", "traced") if ways else ():
            note = "above what the problem holds; process of its own"
            measures.append(
                measure(f"{name}: peak memory, {how}", memory(name, how), "MB", None, 1, note)
            )
        if rival is not None or not only:
            measures += against_rival(name, given, rival, count, milliseconds)
    write("steps", joined(measures), {"lr": LR, "tv_weight": TV, "ways": list(WAYS)}, "steps")


def alone(given: Problem, steps: int) -> float:
    """Median seconds of the bare loop's iteration, undisturbed.

    The rival runs alone too. Two loops that take turns find neither caches nor memory warm.
    """
    bare = BareLoop(given)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        bare.step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM_UP:])


def joined(measures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stored measures with new ones in their places, by case."""
    file = ROOT / "results" / "descent" / "steps.json"
    stored = json.loads(file.read_text(encoding="utf-8"))["measures"] if file.is_file() else []
    found = {m["name"]: m for m in [*stored, *measures]}
    order = {name: number for number, name in enumerate(CASES)}
    return sorted(found.values(), key=lambda m: order[m["name"].rpartition(": ")[0]])


def memory(name: str, way: str) -> float:
    """Peak megabytes of a few iterations, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, way]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return float(done.stdout.split()[-1])


def peak(name: str, way: str, images: ImageSet) -> None:
    """Print the growth of the peak over three iterations."""
    given = problem(CASES[name], images)
    bare = BareLoop(given)
    at: tuple[descent.Variables, descent.Variables, Tensor]
    at = ({"x": given.start}, {}, torch.zeros(()))
    call = None if way == "bare" else descent.slopes(
        way, given.objective(), given.case.candidates, at)  # type: ignore[arg-type]  # fmt: skip
    before = high_water()
    for _ in range(3):
        if call is None:
            bare.step()
        else:
            call(*at)
    print((high_water() - before) / 2**20)


def against_rival(
    name: str, given: Problem, python: str | None, count: int, bare: float
) -> list[dict[str, Any]]:
    """The rival's iteration on the same problem, as a ratio to the bare loop's."""
    found = run_rival(name, given, python, steps=count + 20)
    if "skipped" in found or found.get("seconds_per_iteration") is None:
        print(f"{name}: breaching skipped ({found.get('skipped', 'no steady state')})", flush=True)
        return []
    milliseconds = 1e3 * float(found["seconds_per_iteration"]) * given.case.candidates
    note = f"{milliseconds:.2f} ms for all starts, one after the other; version {found['version']}"
    done = measure(f"{name}: breaching / bare loop", milliseconds / bare, "", None, count, note)
    say(done)
    grown = (found["peak_bytes"] - found.get("peak_bytes_before", 0)) / 2**20
    return [done, measure(f"{name}: peak memory, breaching", grown, "MB", None, 1,
                          "above what its process held before")]  # fmt: skip


def run_rival(name: str, given: Problem, python: str | None, *, steps: int) -> dict[str, Any]:
    """One run of ``rival.py`` in a process of its own."""
    case = given.case
    local = None
    if isinstance(case.protocol, FedAVG):
        local = {
            "lr": case.protocol.lr, "batch_size": case.protocol.batch_size,
            "steps": case.protocol.epochs * -(-case.batch // case.protocol.batch_size),
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"x": given.x, "y": given.y, "start": given.start}
        tensors |= {f"parameter/{n}": p.detach() for n, p in given.model.named_parameters()}
        tensors |= {f"buffer/{n}": b.detach() for n, b in given.model.named_buffers()}
        tensors |= {f"update/{n}": t for n, t in given.g.items()}
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()}, f"{folder}/t.safetensors"
        )
        job = {
            "case": name, "batch": case.batch, "restarts": case.candidates, "steps": steps,
            "seed": 0, "tensors": f"{folder}/t.safetensors", "mean": CIFAR10.mean,
            "std": CIFAR10.std, "fedavg": local, "attack": "published", "threads": 1,
            "tv_weight": TV,
            "model": {"name": case.model, "kwargs": {"classes": 10, "seed": 0, **case.settings}},
        }  # fmt: skip
        Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
        script = [python or sys.executable, str(ROOT / "benchmarks" / "rival.py")]
        subprocess.run([*script, f"{folder}/job.json", f"{folder}/out.json"], check=True,
                       env=environment(), capture_output=True)  # fmt: skip
        found: dict[str, Any] = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
        return found


# -- the FedAVG replay -----------------------------------------------------------------------------


def unroll() -> None:
    """Time and memory of one slope through 5 to 50 local steps of ResNet-8, eight images each."""
    measures: list[dict[str, Any]] = []
    for count in (5, 10, 25, 50):
        figures: dict[bool, tuple[float, float]] = {}
        for forget in (False, True):
            command = [sys.executable, __file__, "--unrolled", str(count), str(int(forget))]
            done = subprocess.run(command, capture_output=True, text=True, check=True,
                                  env=environment())  # fmt: skip
            seconds, megabytes = (float(word) for word in done.stdout.split()[-2:])
            figures[forget] = (seconds, megabytes)
            how = "weights kept" if forget else "graph kept"
            measures.append(measure(f"{count} steps, {how}: peak memory", megabytes, "MB", None, 1))
            measures.append(measure(f"{count} steps, {how}: time", seconds, "s", None, 1))
        for index, what in enumerate(("time", "peak memory")):
            ratio = figures[True][index] / figures[False][index]
            measures.append(measure(f"{count} steps: {what}, weights kept / graph kept", ratio, "",
                                    None, 1))  # fmt: skip
            say(measures[-1])
    write("unroll", measures, {"model": "resnet8", "batch": 8, "lr": 0.01}, "unroll")


def unrolled(count: int, forget: bool) -> None:
    """Print seconds and megabytes of one slope."""
    model = models.build("resnet8", classes=10, seed=0).train()
    replay.without_running_statistics(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 32, 32, generator=generator)
    y = torch.arange(8)
    protocol = FedAVG(epochs=count, batch_size=8, lr=0.01)
    g = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    before = high_water()
    times = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        begun = time.process_time()
        sent = replay.unroll(model, parameters, {}, leaf, y, protocol, checkpoint=forget)
        torch.autograd.grad(matching.cosine(sent, g), leaf)
        times.append(time.process_time() - begun)
    print(min(times), (high_water() - before) / 2**20)


# -- PSNR against time -----------------------------------------------------------------------------

PRESETS = {
    "published": InvertingGradients(steps=2_000),
    "tuned": InvertingGradients.tuned(steps=350),
}
DEEP = {**PRESETS, "tuned": replace(PRESETS["tuned"], distance="cosine", tv_weight=0.03)}
"""For ResNet-18, where the cosine did better on a train image."""


@dataclass(frozen=True)
class Comparison:
    """One case of ``quality``; the rival has the first ``rival`` batches of the first seed."""

    model: str
    batch: int
    batches: int
    rival: int
    seeds: tuple[int, ...] = (0,)
    presets: Mapping[str, InvertingGradients] = field(default_factory=lambda: PRESETS)


QUALITY = {
    "convnet": Comparison("convnet", 1, 16, rival=4, seeds=(0, 1, 2)),
    "convnet, batch 8": Comparison("convnet", 8, 3, rival=1),
    "resnet18": Comparison("resnet18", 1, 2, rival=1, presets=DEEP),
}

RIVAL = "breaching"
"""Its published preset."""

Job = tuple[str, str, int, int, Path]
"""Case, preset, number of the batch, seed, folder of the images."""


def curve(job: Job, python: str | None) -> dict[str, Any]:
    """One run: PSNR of the best iterate so far against the processor time that it took."""
    name, preset, number, seed, data = job
    torch.set_num_threads(1)
    model, batch = QUALITY[name].model, QUALITY[name].batch
    images = parquet(data / "test.parquet", limit=200)
    chosen = [number] if batch == 1 else distinct(images, batch, skip=20 * number)
    scenario = Scenario(
        model=ModelRef("builtin", model, {"classes": 10, "seed": seed}),
        protocol=FedSGD(mode="eval"), examples=batch, grants=frozenset({Grant.LABELS}), seed=seed,
    )  # fmt: skip
    played = stage(scenario, victims=images.subset(chosen), box=CIFAR10)
    view = played.view([played.federation.play_round()])
    if preset == RIVAL:
        x, y = CIFAR10.normalize(images.images[chosen]), images.labels[chosen]
        start = torch.randn(1, *x.shape, generator=torch.Generator().manual_seed(seed))
        case = Case(model, batch)
        given = Problem(case, view.model, x, y, dict(view.update.tensors), start)
        ran = run_rival(name, given, python, steps=_attack(name, preset).steps)
        if "skipped" in ran:
            raise RuntimeError(f"breaching is skipped: {ran['skipped']}; give --rival")
        points = [*ran["curve"], [ran["cpu_seconds"], ran["psnr"]]]
        return {"seconds": [s for s, _ in points], "psnr": [p for _, p in points], "name": name,
                "preset": preset, "image": number, "seed": seed}  # fmt: skip
    kept: list[tuple[float, Tensor]] = []
    warm_up()
    begun = time.process_time()

    def keep(best: Mapping[str, Tensor]) -> None:
        kept.append((time.process_time() - begun, best["x"][0]))

    watch = Watch(conduct=Conduct(execution="eager", keep=keep))
    found = _attack(name, preset)(view, seed=seed, watch=watch)
    kept.append((time.process_time() - begun, found.images))
    truth, labels = played.truth(0).images, played.truth(0).labels
    order = [int((found.labels == label).nonzero()[0]) for label in labels]  # distinct, granted
    scores = [float(psnr(CIFAR10.denormalize(x[order]).clamp(0, 1), truth).mean()) for _, x in kept]
    return {"seconds": [s for s, _ in kept], "psnr": scores, "name": name, "preset": preset,
            "image": number, "seed": seed}  # fmt: skip


def warm_up() -> None:
    """One step of an optimizer: a process's first one imports torch's compiler, for seconds."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()


def quality(data: Path, workers: int, journal: Path, python: str | None) -> None:
    """Both presets on the same problems, and the rival on the first of them."""
    done: dict[str, dict[str, Any]] = {}
    if journal.is_file():
        lines = journal.read_text(encoding="utf-8").splitlines()
        done = {entry["key"]: entry["result"] for entry in map(json.loads, lines)}
    jobs = [
        (name, preset, number, seed, data)
        for name, case in QUALITY.items()
        for seed in case.seeds
        for number in range(case.batches)
        for preset in (*PRESETS, RIVAL)
        if preset != RIVAL or (python is not None and seed == case.seeds[0] and number < case.rival)
    ]
    open_jobs = [job for job in jobs if _key(job) not in done]
    journal.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool, journal.open("a", encoding="utf-8") as file:
        results = pool.map(curve, open_jobs, [python] * len(open_jobs))
        for job, result in zip(open_jobs, results, strict=True):
            done[_key(job)] = result
            file.write(json.dumps({"key": _key(job), "result": result}) + "\n")
            file.flush()
            print(f"{_key(job)}: {result['psnr'][-1]:.1f} dB, {result['seconds'][-1]:.0f} s",
                  flush=True)  # fmt: skip
            report(jobs, done)
    report(jobs, done)


def report(jobs: Sequence[Job], done: Mapping[str, dict[str, Any]]) -> None:
    """Write what is complete so far."""
    measures: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    for name in QUALITY:
        if not all(_key(job) in done for job in jobs if job[0] == name):
            continue
        by: dict[str, list[dict[str, Any]]] = {}
        for job in jobs:
            if job[0] == name:
                by.setdefault(job[1], []).append(done[_key(job)])
        measures += compare(name, by["published"], by["tuned"])
        if RIVAL in by:
            measures += beside_rival(name, by["published"], by[RIVAL])
        curves[name] = {preset: mean_curve(runs) for preset, runs in by.items()}
    settings = {
        name: {preset: attack.to_json() for preset, attack in case.presets.items()}
        for name, case in QUALITY.items()
    }
    recipe = {"curves": curves, "presets": settings}
    if measures:
        write("quality", measures, recipe, "quality", seeds=sorted({job[3] for job in jobs}))


def _key(job: Job) -> str:
    return f"{job[0]} | {job[1]} | {job[2]} | {job[3]} | {_attack(job[0], job[1]).to_json()}"


def _attack(name: str, preset: str) -> InvertingGradients:
    """The rival runs what is published."""
    return QUALITY[name].presets["published" if preset == RIVAL else preset]


def beside_rival(
    name: str, published: list[dict[str, Any]], rival: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Our published preset and the rival's on the same problems, each from its own start."""
    mine = {(r["image"], r["seed"]): r for r in published}
    pairs = [(mine[r["image"], r["seed"]], r) for r in rival]
    note = "same problems, other starts; first seed"
    return [
        with_interval(
            f"{name}: final PSNR, breaching", [r["psnr"][-1] for r in rival], "dB", note
        ),
        with_interval(
            f"{name}: gain of published over breaching",
            [own["psnr"][-1] - other["psnr"][-1] for own, other in pairs], "dB", note,
        ),
        measure(
            f"{name}: time of published / time of breaching",
            sum(own["seconds"][-1] for own, _ in pairs)
            / sum(other["seconds"][-1] for _, other in pairs),
            "", None, len(pairs), "processor time",
        ),
    ]  # fmt: skip


def compare(
    name: str, published: list[dict[str, Any]], tuned: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Final PSNR, the gain, and the share of the published run's time that ours needs."""
    target = statistics.mean(r["psnr"][-1] for r in published)
    whole = statistics.mean(r["seconds"][-1] for r in published)
    reached = mean_curve(tuned)
    first = next((s for s, p in zip(*reached.values(), strict=True) if p >= target), float("nan"))
    before, after = by_image(published), by_image(tuned)
    gains = [after[image] - before[image] for image in before]
    rows = {
        "final PSNR, published": list(before.values()),
        "final PSNR, tuned": list(after.values()),
        "gain of tuned over published": gains,
    }
    seeds = len({r["seed"] for r in published})
    note = f"n counts images, each the mean of {seeds} seeds" if seeds > 1 else ""
    found = [with_interval(f"{name}: {what}", values, "dB", note) for what, values in rows.items()]
    n = len(published)
    found.append(
        measure(
            f"{name}: time of tuned / time of published",
            statistics.mean(r["seconds"][-1] for r in tuned) / whole,
            "",
            None,
            n,
            "processor time",
        )
    )
    if first == first:
        found.append(measure(
            f"{name}: share of the published time in which tuned passes its final PSNR",
            first / whole, "", None, n,
            "on the mean curves, read every 25 iterations"))  # fmt: skip
    return found


def by_image(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Final PSNR of every image (or batch), the mean over seeds: images are what is sampled."""
    found: dict[int, list[float]] = {}
    for run in runs:
        found.setdefault(run["image"], []).append(run["psnr"][-1])
    return {image: statistics.mean(values) for image, values in found.items()}


def mean_curve(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean seconds and mean PSNR at equal iterations."""
    points = min(len(r["seconds"]) for r in runs)
    return {
        what: [statistics.mean(r[what][i] for r in runs) for i in range(points)]
        for what in ("seconds", "psnr")
    }


# -- what all share --------------------------------------------------------------------------------


def measure(
    name: str, value: float, unit: str, interval: tuple[float, float] | None, n: int, note: str = ""
) -> dict[str, Any]:
    """One measured value in the form of a result file."""
    if interval is None and n > 1 and not note:
        note = "a median"
    return {
        "name": name, "value": value, "unit": unit, "interval": interval, "n": n, "note": note
    }  # fmt: skip


def with_interval(name: str, values: Sequence[float], unit: str, note: str = "") -> dict[str, Any]:
    """A mean with its 95 % bootstrap interval."""
    sample = torch.tensor(list(values), dtype=torch.float64)
    if len(sample) < 2:
        return measure(name, float(sample.mean()), unit, None, len(sample), note)
    low, high = bootstrap(sample, generator=stream("descent", name))
    return measure(name, float(sample.mean()), unit, (low, high), len(sample), note)


def interval_of_median(values: Tensor, name: str) -> tuple[float, float]:
    """95 % bootstrap interval of a median."""
    generator = stream("descent", name)
    picks = torch.randint(len(values), (1_000, len(values)), generator=generator)
    medians = values[picks].median(1).values
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))


def say(entry: Mapping[str, Any]) -> None:
    """One line for people."""
    print(f"{entry['name']}: {entry['value']:.3g} {entry['unit']} {entry['note']}", flush=True)


def high_water() -> float:
    """Peak resident bytes of this process; ``ru_maxrss`` would count its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return 1024.0 * int(line.split()[1])
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment() -> dict[str, str]:
    """One thread in every process."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source.rstrip(os.pathsep)}


def hardware() -> str:
    """The machine in a few words."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {where}, torch {torch.__version__}"


def write(
    name: str,
    measures: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    command: str,
    seeds: Sequence[int] = (0,),
) -> None:
    """One result file."""
    document = {
        "schema": "leakatlas/result/1",
        "kind": "benchmark",
        "key": f"descent-{name}",
        "code_version": 1,
        "recipe": {"threads": 1, **recipe},
        "hardware": hardware(),
        "seeds": list(seeds),
        "measures": list(measures),
        "command": f"python benchmarks/descent.py {command} --data cifar10",
        "date": datetime.date.today().isoformat(),
    }
    file = ROOT / "results" / "descent" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", default=["steps", "unroll", "quality"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "cifar10")
    parser.add_argument("--rival", help="a Python with the extra `bench`")
    parser.add_argument("--only", nargs="+", choices=CASES, help="cases of `steps`")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS,
                        help="executions; none: the bare loop and the rival")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--journal", type=Path, default=ROOT / "build" / "descent.jsonl")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--unrolled", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.unrolled:
        unrolled(arguments.unrolled[0], bool(arguments.unrolled[1]))
        return
    images = parquet(arguments.data / "test.parquet", limit=200)
    if arguments.peak:
        name, way = arguments.peak
        peak(name, way, images)
        return
    parts: dict[str, Callable[[], None]] = {
        "steps": lambda: steps(images, arguments.rival, arguments.only, arguments.ways),
        "unroll": unroll,
        "quality": lambda: quality(
            arguments.data, arguments.workers, arguments.journal, arguments.rival
        ),
    }
    for name in arguments.parts:
        parts[name]()


if __name__ == "__main__":
    main()
