"""Runs ``breaching`` on one case and reports its time, memory and progress.

    python benchmarks/rival.py JOB.json OUT.json

breaching (Geiping et al., package of that name, MIT license) is the widest public framework of
gradient inversion. Here it is called by its public interface, on a model, weights and an update
that LeakAtlas made, so that both engines solve the same problem. It runs in a process of its own,
since it brings its own packages and warnings. Where it is not installed (extra ``bench``), the
output says ``{"skipped": reason}``.

Time stamps and copies of the candidate are taken in a hook of torch's optimizers, after each step.
Scoring happens after the clock has stopped; the truth never enters the attack.

What differs from our own engine, by breaching's design, and is left as it is:
    - Its total variation pads the image with zeros, so two borders add ``|x|``; inside it is the
      sum of our two means.
    - The iterate it keeps is chosen by the whole objective, prior included, and is stored *after*
      the step whose objective was measured *before* it.
    - Restarts run one after the other; they are ranked by the matching loss without the prior.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from leakatlas import models
from leakatlas.data import Box
from leakatlas.metrics import assign, pairwise_mse, psnr_of_mse

WARM_UP = 10
"""Iterations of every restart that count as warm-up (its losses are compiled on first use)."""

POINTS = 40
"""Points of the curve, about."""

ATTACKS = {"published": "invertinggradients"}
"""Our name of an attack, and breaching's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run, as the JSON file says it.

    Args:
        case: Name of the case, only repeated in the output.
        batch: Images in the private batch, B.
        restarts: Independent starts, R.
        steps: Iterations of a restart.
        seed: Of the starts, where ``tensors`` holds none.
        tensors: A safetensors file with ``x`` (B, C, H, W) in model space, for scoring alone;
            ``y`` (B,); ``parameter/<name>``, ``buffer/<name>``, ``update/<name>``; optionally
            ``start`` (R, B, C, H, W).
        mean: Of the pixel box, per channel.
        std: Of the pixel box, per channel.
        model: ``name`` and ``kwargs`` of :func:`leakatlas.models.build`.
        attack: A key of :data:`ATTACKS`.
        fedavg: None for one mean gradient; ``lr``, ``steps`` and ``batch_size`` of plain local SGD
            in the order of the batch, if ``update`` is a weight delta, after - before.
        tv_weight: Of breaching's total variation; its own default if None.
        threads: Threads of torch.
    """

    case: str
    batch: int
    restarts: int
    steps: int
    seed: int
    tensors: str
    mean: list[float]
    std: list[float]
    model: Mapping[str, Any]
    attack: str = "published"
    fedavg: Mapping[str, Any] | None = None
    tv_weight: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class Problem:
    """The tensors of a job, and breaching's two ends of the protocol made of them."""

    x: Tensor
    y: Tensor
    starts: Tensor | None
    model: nn.Module
    payload: list[dict[str, Any]]
    shared: list[dict[str, Any]]


@dataclass
class Stopwatch:
    """A hook after each optimizer step: a time stamp, and now and then a copy of the candidate.

    Args:
        every: Steps from copy to copy.
        stamps: Wall and CPU seconds after each step, a list a restart.
        copies: CPU seconds of the process and candidate ``(B, C, H, W)``.
    """

    every: int
    stamps: list[list[tuple[float, float]]] = field(default_factory=list)
    copies: list[tuple[float, Tensor]] = field(default_factory=list)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch; breaching optimises a single tensor."""
        del args, kwargs
        spent = time.process_time()
        self.stamps[-1].append((time.perf_counter(), spent))
        if sum(map(len, self.stamps)) % self.every == 0:
            self.copies.append((spent, optimizer.param_groups[0]["params"][0].detach().clone()))

    def per_iteration(self, clock: int) -> float | None:
        """Median seconds from step to step, without the warm-up; None if nothing is left.

        Args:
            clock: 0 for wall time, 1 for the CPU time of the process.
        """
        gaps = [
            after[clock] - before[clock]
            for trial in self.stamps
            for before, after in zip(trial[WARM_UP:], trial[WARM_UP + 1 :], strict=False)
        ]
        return statistics.median(gaps) if gaps else None


def read_job(path: Path) -> Job:
    """The job of a file.

    Raises:
        ValueError: If it asks for what breaching cannot run or would run as something else.
    """
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    if job.attack not in ATTACKS:
        raise ValueError(f"attack is one of {sorted(ATTACKS)}; got {job.attack!r}.")
    if job.fedavg is not None and job.batch % int(job.fedavg["batch_size"]):
        # its replay loses its place in the epoch after a short batch
        raise ValueError(
            f"breaching replays whole local batches only; {job.batch} images do not divide into "
            f"batches of {job.fedavg['batch_size']}."
        )
    return job


def problem_of(job: Job) -> Problem:
    """Model, payload (what the server sent) and shared data (what the client returned)."""
    tensors = load_file(job.tensors)
    model = models.build(job.model["name"], **job.model.get("kwargs", {})).eval()
    model.load_state_dict({**under("parameter/", tensors), **under("buffer/", tensors)})
    update = under("update/", tensors)
    y = tensors["y"]
    x = tensors["x"]
    if len(x) != job.batch or len(y) != job.batch:
        raise ValueError(f"batch is {job.batch}; the file holds {len(x)} images, {len(y)} labels.")
    starts = tensors.get("start")
    if starts is not None and starts.shape != (job.restarts, *x.shape):
        raise ValueError(f"start must be {(job.restarts, *x.shape)}, got {tuple(starts.shape)}.")
    payload = {
        "parameters": [p.detach() for p in model.parameters()],
        # a list, even an empty one, puts its model into eval mode
        "buffers": list(model.buffers()),
        "metadata": SimpleNamespace(
            modality="vision", shape=tuple(x.shape[1:]), mean=job.mean, std=job.std
        ),
    }
    shared = {
        "gradients": [update[name] for name, _ in model.named_parameters()],
        "buffers": None,
        "metadata": {
            "num_data_points": job.batch,
            "labels": y,
            "local_hyperparams": local_hyperparameters(job, y),
        },
    }
    return Problem(x, y, starts, model, [payload], [shared])


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one kind, without the prefix of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def local_hyperparameters(job: Job, y: Tensor) -> dict[str, Any] | None:
    """What breaching must know to unroll local steps; None for a single gradient."""
    if job.fedavg is None:
        return None
    size, steps = int(job.fedavg["batch_size"]), int(job.fedavg["steps"])
    batches = y.split(size)
    return {
        "lr": float(job.fedavg["lr"]),
        "steps": steps,
        "data_per_step": size,
        "labels": [batches[step % len(batches)] for step in range(steps)],
    }


def rival() -> ModuleType:
    """The package, without its notice that TorchScript is deprecated.

    Raises:
        ImportError: If it, or something that it needs, is not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script.*")
        return importlib.import_module("breaching")


def configuration(breaching: ModuleType, job: Job) -> Any:
    """Its published configuration, with the length of the run and the weight of the prior."""
    overrides = [f"optim.max_iterations={job.steps}", "restarts.num_trials=1"]
    if job.tv_weight is not None:
        overrides.append(f"regularization.total_variation.scale={job.tv_weight}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="breaching")
        return breaching.get_attack_config(ATTACKS[job.attack], overrides=overrides)


def run(breaching: ModuleType, job: Job) -> dict[str, Any]:
    """One timed attack; the scoring comes after it."""
    problem = problem_of(job)
    config = configuration(breaching, job)
    setup = {"device": torch.device("cpu"), "dtype": torch.float32}
    attacker = breaching.attacks.prepare_attack(problem.model, nn.CrossEntropyLoss(), config, setup)
    idle_bytes = peak_bytes()
    watch = Stopwatch(every=max(1, job.restarts * job.steps // POINTS))
    found: list[tuple[float, Tensor]] = []
    objectives: list[list[float]] = []
    # the first step of a process imports torch's compiler, for seconds
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0).step()
    torch.manual_seed(job.seed)
    handle = register_optimizer_step_post_hook(watch)
    started, spent = time.perf_counter(), time.process_time()
    for restart in range(job.restarts):
        watch.stamps.append([])
        # One call a restart: `initial_data` is shared by all trials of a call. Without the empty
        # secrets it raises after the whole optimization.
        answer, stats = attacker.reconstruct(
            problem.payload,
            problem.shared,
            server_secrets={},
            initial_data=None if problem.starts is None else problem.starts[restart],
        )
        found.append((stats["opt_value"], answer["data"]))
        objectives.append(stats["Trial_0_Val"])
    total, cpu = time.perf_counter() - started, time.process_time() - spent
    handle.remove()
    used_bytes = peak_bytes()
    score, best = min(found, key=lambda one: one[0])
    box = Box(mean=tuple(job.mean), std=tuple(job.std))
    return {
        "case": job.case,
        "version": importlib.metadata.version("breaching"),
        "torch": torch.__version__,
        "seconds_per_iteration": watch.per_iteration(0),
        # steadier than wall time on a machine that does other work too
        "cpu_seconds_per_iteration": watch.per_iteration(1),
        "total_seconds": total,
        "cpu_seconds": cpu,
        "curve": [[stamp - spent, mean_psnr(copy, problem, box)] for stamp, copy in watch.copies],
        "peak_bytes": used_bytes,
        "peak_bytes_before": idle_bytes,
        "psnr": mean_psnr(best, problem, box),
        "psnr_of_restarts": [mean_psnr(x, problem, box) for _, x in found],
        "final_objective": finite(score),
        "objectives": [
            # a restart whose objective was never finite has none
            {"first": values[0], "last": values[-1], "iterations": len(values)}
            if values
            else {"first": None, "last": None, "iterations": 0}
            for values in objectives
        ],
        "distance_at_truth": finite(distance_at_truth(attacker, problem)),
        "settings": settings(config, job, problem),
    }


def peak_bytes() -> int:
    """Largest resident memory of this process so far, imports included.

    ``ru_maxrss`` survives ``exec`` and may be that of the process which started this one, so
    Linux's own count of this program comes first.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finite(value: float) -> float | None:
    """The value, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def mean_psnr(x_hat: Tensor, problem: Problem, box: Box) -> float | None:
    """Mean PSNR in dB over the batch, or None if the candidate is not finite.

    A candidate belongs to the original at its place where labels are distinct, for then the
    label names the original; else one-to-one at least total error.
    """
    if not bool(torch.isfinite(x_hat).all()):
        return None
    cost = pairwise_mse(box.denormalize(x_hat).clamp(0, 1), box.denormalize(problem.x).clamp(0, 1))
    places = range(len(cost))
    if len(problem.y.unique()) == len(problem.y):
        rows = list(places)
    else:
        rows = [row for row in assign(cost).of_original if row is not None]
    return float(psnr_of_mse(cost[rows, list(places)]).mean())


def distance_at_truth(attacker: Any, problem: Problem) -> float:
    """Its matching loss at the private batch: 0 if both sides mean the same computation."""
    replicas, labels, _ = attacker.prepare_attack(problem.payload, problem.shared)
    hyperparameters = problem.shared[0]["metadata"]["local_hyperparams"]
    attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, hyperparameters)
    value, _ = attacker.objective(replicas[0], problem.shared[0]["gradients"], problem.x, labels)
    return float(value.detach())


def settings(config: Any, job: Job, problem: Problem) -> dict[str, Any]:
    """What was run."""
    omegaconf = importlib.import_module("omegaconf")  # comes with breaching
    own = omegaconf.OmegaConf.to_container(config, resolve=True)
    assert isinstance(own, dict)
    return {
        "configuration": ATTACKS[job.attack],
        **{name: own[name] for name in ("objective", "optim", "regularization", "impl")},
        "restarts": job.restarts,
        "restarts_run": "one call each, one after the other",
        "restarts_ranked_by": own["restarts"]["scoring"],
        "start": f"torch.randn, seed {job.seed}" if problem.starts is None else "given",
        "labels": "given, in the order of the batch",
        "mode": "eval",
        "fedavg": dict(job.fedavg) if job.fedavg is not None else None,
        "batch": job.batch,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Read the job, run it, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("job", type=Path, help="JSON file, see Job")
    parser.add_argument("out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    job = read_job(arguments.job)
    torch.set_num_threads(job.threads)
    try:
        breaching = rival()
    except ImportError as error:
        out: dict[str, Any] = {"skipped": f"breaching cannot be imported: {error}"}
    else:
        out = run(breaching, job)
    text = json.dumps(out, allow_nan=False) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    if "skipped" in out:
        print(out["skipped"], file=sys.stderr)


if __name__ == "__main__":
    main()
