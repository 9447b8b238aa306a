"""Breaching on a problem of ours: asked from here, run in a Python of its own.

breaching brings packages that cannot share ours. ``$LEAKATLAS_RIVAL`` names a Python that has it
(extra ``bench``) and LeakAtlas; the adapter ``benchmarks/rival.py`` of the checkout runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from leakatlas.catalogue.results import repository_root
from leakatlas.errors import InvalidInput, Unavailable
from leakatlas.fl import FedAVG, Stage, View

VARIABLE = "LEAKATLAS_RIVAL"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One victim's update, and what scores the answer.

    Args:
        stage: The live side; model, pixel space and protocol are taken from it.
        view: What the adversary holds.
        target: Whose update it is.
        starts: Starts ``(R, N, C, H, W)`` in the model's input space; breaching draws its own if
            None.
        tv_weight: Of breaching's total variation; its own default if None.
    """

    stage: Stage
    view: View
    target: int = 0
    starts: Tensor | None = None
    tv_weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What breaching made of a problem.

    Args:
        psnr: Mean PSNR in dB.
        seconds_per_iteration: Median wall time, of one restart.
        cpu_seconds_per_iteration: Median CPU time.
        peak_memory: MiB on top of what it held before.
    """

    psnr: float
    seconds_per_iteration: float
    cpu_seconds_per_iteration: float
    peak_memory: float


def ask(
    problems: Sequence[Problem], *, steps: int | None = None, cpu_seconds: float | None = None
) -> list[Answer]:
    """Run breaching's published configuration of Inverting Gradients on each problem, in turn.

    Args:
        problems: The problems.
        steps: Iterations of every restart.
        cpu_seconds: CPU time of every problem instead; its iterations follow from a short probe.

    Raises:
        InvalidInput: If its replay of local steps would be another computation.
        Unavailable: If there is no such Python, or breaching fails in it.
    """
    python, root = os.environ.get(VARIABLE), repository_root()
    if python is None or root is None:
        raise Unavailable(
            "breaching runs in a Python of its own, from a checkout: install the extra 'bench' "
            f"into one and name it in ${VARIABLE}."
        )
    with tempfile.TemporaryDirectory(prefix="leakatlas-") as name:
        folder = Path(name)
        told = [_told(problem, folder / f"{i}.safetensors") for i, problem in enumerate(problems)]
        asked, out = folder / "asked.json", folder / "out.json"
        content = {"steps": steps, "cpu_seconds": cpu_seconds, "problems": told}
        asked.write_text(json.dumps(content), encoding="utf-8")
        command = [python, str(root / "benchmarks" / "rival.py"), str(asked), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise Unavailable(f"breaching failed in {python}: {done.stderr[-400:]}")
        return [Answer(**answer) for answer in json.loads(out.read_text(encoding="utf-8"))]


def _told(problem: Problem, file: Path) -> dict[str, Any]:
    stage, view = problem.stage, problem.view
    victims, protocol = stage.victims[problem.target], stage.scenario.protocol
    tensors = {
        "x": stage.box.normalize(victims.images),
        "y": victims.labels,
        **{f"state/{n}": t for n, t in stage.federation.model.state_dict().items()},
        **{f"update/{n}": t for n, t in view.update.tensors.items()},
        **({} if problem.starts is None else {"start": problem.starts}),
    }
    save_file({n: t.detach().clone().contiguous() for n, t in tensors.items()}, file)
    local = None
    if isinstance(protocol, FedAVG):
        if len(victims.images) % protocol.batch_size:
            raise InvalidInput(
                f"breaching replays whole local batches only; {len(victims.images)} images do not "
                f"divide into batches of {protocol.batch_size}."
            )
        each = len(victims.images) // protocol.batch_size
        local = {
            "lr": protocol.lr, "data_per_step": protocol.batch_size,
            "steps": protocol.epochs * each,
        }  # fmt: skip
    model = stage.scenario.model
    return {
        "tensors": str(file), "seed": stage.scenario.seed, "fedavg": local,
        "mean": list(stage.box.mean), "std": list(stage.box.std), "tv_weight": problem.tv_weight,
        "model": {"name": model.name, "kwargs": dict(model.kwargs)},
    }  # fmt: skip
