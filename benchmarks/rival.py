"""Runs ``breaching`` on problems that LeakAtlas made: ``python rival.py ASKED.json OUT.json``.

breaching (Geiping et al., package of that name, MIT license) is the widest public framework of
gradient inversion. Here it is called by its public interface, in a process of its own, since it
brings its own packages and warnings; :mod:`leakatlas.bench.rival` asks. Time stamps are taken in a
hook of torch's optimizers, after each step; scoring happens after the clock has stopped, and the
truth never enters the attack.

What differs from our own engine, by breaching's design, and is left as it is:
    - Its total variation pads the image with zeros, so two borders add ``|x|``; inside it is the
      sum of our two means.
    - The iterate it keeps is chosen by the whole objective, prior included, and is stored *after*
      the step whose objective was measured *before* it.
    - Restarts run one after the other; they are ranked by the matching loss without the prior.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from leakatlas import models
from leakatlas.bench import machine
from leakatlas.data import Box
from leakatlas.metrics import assign, pairwise_mse, psnr_of_mse

WARM_UP = 10
"""Iterations of every restart that count as warm-up (its losses are compiled on first use)."""

PROBE = 30
"""Iterations from which the pace is measured, where CPU time is given instead of steps."""


def main() -> None:
    """Read what is asked, run every problem, write what came out."""
    asked, out = map(Path, sys.argv[1:])
    wanted = json.loads(asked.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script.*")
        breaching = importlib.import_module("breaching")
    steps = wanted["steps"]
    if steps is None:
        pace = run(breaching, wanted["problems"][0], PROBE)["cpu_seconds_per_iteration"]
        steps = max(1, round(wanted["cpu_seconds"] / pace))
    found = [run(breaching, problem, steps) for problem in wanted["problems"]]
    out.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")


def run(breaching: ModuleType, problem: dict[str, Any], steps: int) -> dict[str, float]:
    """One timed attack of its published configuration; the scoring comes after it."""
    tensors = load_file(problem["tensors"])
    model, payload, shared = ends(problem, tensors)
    overrides = [f"optim.max_iterations={steps}", "restarts.num_trials=1"]
    if problem["tv_weight"] is not None:
        overrides.append(f"regularization.total_variation.scale={problem['tv_weight']}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="breaching")
        config = breaching.get_attack_config("invertinggradients", overrides=overrides)
    setup = {"device": torch.device("cpu"), "dtype": torch.float32}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config, setup)
    # The first step of a process imports torch's compiler, for seconds.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    stamps: list[list[tuple[float, float]]] = []

    def stamp(*optimizer: object) -> None:
        stamps[-1].append((time.perf_counter(), time.process_time()))

    idle = machine.peak_memory() or 0.0
    torch.manual_seed(problem["seed"])
    handle = register_optimizer_step_post_hook(stamp)
    found: list[tuple[float, Tensor]] = []
    for start in tensors["start"] if "start" in tensors else [None]:
        stamps.append([])
        # One call a restart: `initial_data` is shared by all trials of a call. Without the empty
        # secrets it raises after the whole optimization.
        answer, stats = attacker.reconstruct(payload, shared, server_secrets={}, initial_data=start)
        found.append((stats["opt_value"], answer["data"]))
    handle.remove()
    grown = (machine.peak_memory() or 0.0) - idle
    _, best = min(found, key=lambda one: one[0])
    box = Box(mean=tuple(problem["mean"]), std=tuple(problem["std"]))
    wall, cpu = (pace(stamps, clock) for clock in (0, 1))
    return {
        "psnr": psnr(best, tensors["x"], box),
        "seconds_per_iteration": wall,
        "cpu_seconds_per_iteration": cpu,
        "peak_memory": grown,
    }


def pace(stamps: list[list[tuple[float, float]]], clock: int) -> float:
    """Median seconds from step to step, warm-up left out; clock 1 is the process's own time."""
    return statistics.median(
        after[clock] - before[clock]
        for trial in stamps
        for before, after in zip(trial[WARM_UP:], trial[WARM_UP + 1 :], strict=False)
    )


def ends(
    problem: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[nn.Module, list[dict[str, Any]], list[dict[str, Any]]]:
    """The model, what the server sent, and what the client returned, in breaching's words."""
    held: dict[str, dict[str, Tensor]] = {"state": {}, "update": {}}
    for name, tensor in tensors.items():
        kind, _, own = name.partition("/")
        held.setdefault(kind, {})[own] = tensor
    model = models.build(problem["model"]["name"], **problem["model"]["kwargs"]).eval()
    model.load_state_dict(held["state"])
    x, y = tensors["x"], tensors["y"]
    meta = SimpleNamespace(
        modality="vision", shape=tuple(x.shape[1:]), mean=problem["mean"], std=problem["std"]
    )
    payload = {
        "parameters": [p.detach() for p in model.parameters()],
        # a list, even an empty one, puts its model into eval mode
        "buffers": list(model.buffers()),
        "metadata": meta,
    }
    local = problem["fedavg"]
    if local is not None:
        batches = y.split(local["data_per_step"])
        local = {**local, "labels": [batches[s % len(batches)] for s in range(local["steps"])]}
    shared = {
        "gradients": [held["update"][name] for name, _ in model.named_parameters()],
        "buffers": None,
        "metadata": {"num_data_points": len(x), "labels": y, "local_hyperparams": local},
    }
    return model, [payload], [shared]


def psnr(found: Tensor, x: Tensor, box: Box) -> float:
    """Mean PSNR in dB, candidates clipped and assigned one to one; 0 dB if one is not finite."""
    if not bool(torch.isfinite(found).all()):
        return 0.0
    cost = pairwise_mse(box.denormalize(found).clamp(0, 1), box.denormalize(x).clamp(0, 1))
    own = [row for row in assign(cost).of_original if row is not None]
    return float(psnr_of_mse(cost[own, range(len(x))]).mean())


if __name__ == "__main__":
    main()
