"""What a GPU gives: the same results up to rounding, and how much sooner.

    python scripts/gpu.py [--device cuda] [--out FOLDER] [--seconds 570] [--only PART]

Four parts, each a process of its own with a time limit, each writing what it has as soon as it has
it: ``parity`` (updates, doctor and attacks on both devices), ``ratios`` (CPU time over GPU time of
descents, rounds and the doctor, with and without TF32), ``tests`` (those of ``tests/device`` on the
real device) and ``full`` (``scripts/full_size.py`` there). The figures go to ``FOLDER/gpu.json``
and ``FOLDER/full_size_cuda.json``; what failed is printed and ends the script with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests and the other scripts

from scripts import full_size  # noqa: E402

import leakatlas  # noqa: E402
from leakatlas import data, devices, models  # noqa: E402
from leakatlas.attacks.api import Attack, Reconstruction  # noqa: E402
from leakatlas.bench import harness, machine  # noqa: E402
from leakatlas.blocks.watch import Conduct, Watch  # noqa: E402
from leakatlas.catalogue import registry  # noqa: E402
from leakatlas.data import IMAGENET, Box  # noqa: E402
from leakatlas.devices import CPU  # noqa: E402
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Protocol, Scenario, Stage, stage  # noqa: E402
from leakatlas.metrics import score  # noqa: E402
from leakatlas.threat import Grant  # noqa: E402

PARTS = {"ratios": 160, "parity": 180, "tests": 230, "full": 420}
"""Seconds that each may take, at most."""

SEED = 0
LENGTHS = (1, 5, 20, 100)
"""Iterations after which the iterates of a descent are compared."""


def small(name: str, **settings: Any) -> Callable[[], tuple[nn.Module, int]]:
    """A network of ours for 32 pixels."""
    return lambda: (models.build(name, size=32, classes=10, **settings), 32)


def large(name: str) -> Callable[[], tuple[nn.Module, int]]:
    """A network at its real size."""
    return lambda: (getattr(full_size, name)(), full_size.SIZE)


NETWORKS = {
    "lenet, 32 pixels": small("lenet"),
    "convnet, 32 pixels": small("convnet"),
    "resnet18, 32 pixels": small("resnet18"),
    "resnet18_group_norm, 224 pixels": large("resnet18_group_norm"),
    "vit_b_16, 224 pixels": large("vit_b_16"),
}


class Figures:
    """Measures, kept on disk as they come."""

    def __init__(self, file: Path) -> None:
        self.file, self.found, self.failed = file, list[dict[str, Any]](), 0

    def add(self, name: str, value: float, unit: str, case: str, note: str = "") -> None:
        """One more."""
        self.found.append(full_size.measure(name, value, unit, case, note))
        self.file.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{case}: {name} {value:.4g} {unit} {note}", flush=True)

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """What fails inside is printed, and the next comes: a lease of a machine is short."""
        try:
            yield
        except Exception:  # whatever a device does not support is what this script is to find
            self.failed += 1
            print(f"FAILED {what}\n{traceback.format_exc()}", flush=True)


def set_up(
    model: nn.Module, size: int, device: torch.device, *, examples: int, clients: int = 1,
    protocol: Protocol | None = None,
) -> Stage:  # fmt: skip
    """Photos of strangers, and a client that holds them."""
    scenario = Scenario(
        model=ModelRef("object", type(model).__name__),
        examples=examples,
        clients=clients,
        protocol=protocol or FedSGD(mode="eval"),
        letter="C",
        grants=frozenset({Grant.LABELS}),
        seed=SEED,
    )
    count = examples * clients
    images = data.patches(size, count, part="victim") if count > 8 else data.photos(size)
    return stage(
        scenario, model=model, victims=images.subset(range(count)), box=box_of(size), device=device
    )


def box_of(size: int) -> Box:
    """The usual normalisation at a size."""
    return IMAGENET if size > 32 else Box.unit(3)


def update_of(live: Stage) -> Tensor:
    """What the first client sends, as one vector."""
    sent = live.federation.play_round(apply=False).updates[0]
    return torch.cat([t.detach().cpu().double().flatten() for t in sent.tensors.values()])


def off(there: Tensor, here: Tensor) -> float:
    """Relative distance."""
    return float((there - here).norm() / here.norm())


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """TF32 allowed for a while, where the product never allows it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        devices.chosen(device)


def parity(device: torch.device, figures: Figures, quick: bool) -> None:
    """The same on both devices: updates, the doctor's residual, every attack, a descent."""
    torch.set_num_threads(3)
    chosen = list(NETWORKS.items())[: 2 if quick else None]
    for name, make in chosen:
        with figures.going_on(name):
            model, size = make()
            here = update_of(set_up(copy.deepcopy(model), size, CPU, examples=2))
            there = update_of(set_up(copy.deepcopy(model), size, device, examples=2))
            figures.add("update, GPU against CPU, float32", off(there, here), "", name)
            with tf32(device):
                rough = update_of(set_up(copy.deepcopy(model), size, device, examples=2))
            figures.add("update, GPU with TF32 against CPU", off(rough, here), "", name)
            for where in (CPU, device):
                diagnosis = leakatlas.doctor(
                    copy.deepcopy(model), data.photos(size).subset([0, 1]), box=box_of(size),
                    threat="A", device=where,
                )  # fmt: skip
                residual = diagnosis.replay.residual
                assert residual is not None and diagnosis.replay.consistent, diagnosis.replay
                figures.add(f"residual of the doctor, {where.type}", residual, "", name)
    from tests.attacks.test_contract import CASES, TABLED
    from tests.conftest import build_stage, surrogate

    keys = TABLED[:3] if quick else TABLED
    for key in keys:
        with figures.going_on(key):
            attack: Attack = registry.attack(key, **CASES[key].parameters)
            row = leakatlas.catalogue.attack(key)
            found = dict[str, Reconstruction]()
            for where in (CPU, device):
                live = build_stage(
                    letter=row.threat_model, grants=attack.grants(), device=where,
                    public=surrogate(int(CASES[key].scene.get("size", 8))),
                    dtype=torch.float32, **CASES[key].scene,
                )  # fmt: skip
                view, _ = harness.observe(live, attack)
                found[where.type] = attack(view, seed=SEED).on_cpu()
            mine, other = found[CPU.type], found[device.type]
            same = str(mine.labels) == str(other.labels)
            apart = (other.images - mine.images).abs()
            figures.add(
                key, float(apart.max()) if apart.numel() else 0.0, "",
                "attacks in float32, largest distance of an image",
                f"{mine.status} on the CPU, {other.status} on the GPU; "
                + ("the same labels" if same else "OTHER LABELS"),
            )  # fmt: skip
    name, make = list(NETWORKS.items())[1]
    model, size = make()
    for dtype in (torch.float32, torch.float64):
        for length in LENGTHS[: 2 if quick else None]:
            with figures.going_on(f"a descent of {length}"):
                attack = registry.attack("inverting_gradients").lasting(length)
                images, right = {}, {}
                for where in (CPU, device):
                    live = set_up(copy.deepcopy(model).to(dtype), size, where, examples=1)
                    view, _ = harness.observe(live, attack)
                    got = attack(view, seed=SEED, watch=eager()).on_cpu()
                    images[where.type] = live.box.denormalize(got.images)
                    truth = live.truth(0).images.to(got.images.dtype)
                    right[where.type] = score(
                        images[where.type], truth, public=data.photos(size).images.to(truth)
                    ).psnr.mean
                apart = (images[device.type] - images[CPU.type]).abs()
                figures.add(
                    f"iterates after {length} steps, largest distance", float(apart.max()),
                    "pixel values in [0, 1]", f"{name}, {dtype}".replace("torch.", ""),
                    f"{right[CPU.type]:.2f} dB on the CPU, {right[device.type]:.2f} dB on the GPU",
                )  # fmt: skip


def eager() -> Watch:
    """Slopes as they are written, on every device."""
    return Watch(conduct=Conduct(execution="eager"))


def waited(device: torch.device) -> float:
    """The time, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one of several, after one that loads what it needs where there are several."""
    if times > 1:
        work()
    begun = waited(device)
    for _ in range(times):
        work()
    return (waited(device) - begun) / times


def ratios(device: torch.device, figures: Figures, quick: bool) -> None:
    """How many times sooner: a step of a descent, a round, the doctor."""
    descents = [
        ("convnet, 32 pixels", 1, 60, 300),
        ("convnet, 32 pixels", 16, 10, 300),
        ("resnet18, 32 pixels", 16, 3, 100),
        ("resnet18_group_norm, 224 pixels", 2, 3, 60),
        ("vit_b_16, 224 pixels", 2, 1, 20),
    ]
    for name, examples, here, there in descents[: 1 if quick else None]:
        with figures.going_on(f"descents on {name}"):
            model, size = NETWORKS[name]()
            case = f"{name}, {examples} images"
            took = {
                where.type: step_of(copy.deepcopy(model), size, examples, where, steps)
                for where, steps in ((CPU, here), (device, there))
            }
            for threads in (3,):
                torch.set_num_threads(threads)
                more = step_of(copy.deepcopy(model), size, examples, CPU, here)
                figures.add(f"a descent's step, CPU, {threads} threads", 1e3 * more, "ms", case)
                torch.set_num_threads(1)
            told(figures, "a descent's step", took, device, case)
            if size > 32:
                with tf32(device):
                    rough = step_of(copy.deepcopy(model), size, examples, device, there)
                figures.add("a descent's step, GPU with TF32", 1e3 * rough, "ms", case)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) / 2**30
                figures.add("peak memory so far, GPU", peak, "GiB", case)
    with figures.going_on("rounds"):
        protocol, name = FedAVG(epochs=1, batch_size=8, lr=0.01), "resnet18, 32 pixels"
        took = {}
        for where, times in ((CPU, 1), (device, 1 if quick else 5)):
            model, size = NETWORKS[name]()
            live = set_up(model, size, where, examples=32, clients=4, protocol=protocol)
            took[where.type] = seconds_of(live.federation.play_round, where, times)
        told(figures, "a round of 4 clients, 4 steps each", took, device, name)
    for name in list(NETWORKS)[1 : 2 if quick else None : 2]:
        with figures.going_on(f"doctor of {name}"):
            model, size = NETWORKS[name]()
            took = {}
            for where, times in ((CPU, 1), (device, 1 if quick else 2)):
                asked = functools.partial(
                    leakatlas.doctor, model, data.photos(size).subset([0, 1]), box=box_of(size),
                    device=where,
                )  # fmt: skip
                took[where.type] = seconds_of(asked, where, times)
            told(figures, "the doctor", took, device, name)


def step_of(
    model: nn.Module, size: int, examples: int, device: torch.device, steps: int
) -> float:  # fmt: skip
    """Seconds of a step of Inverting Gradients."""
    attack = registry.attack("inverting_gradients")
    view, _ = harness.observe(set_up(model, size, device, examples=examples), attack)
    if steps > 1:
        attack.lasting(1)(view, seed=SEED, watch=eager())
    found: Reconstruction = attack.lasting(steps)(view, seed=SEED, watch=eager())
    return found.seconds / steps


def told(
    figures: Figures, what: str, took: dict[str, float], device: torch.device, case: str
) -> None:
    """Both times and their ratio."""
    here, there = took[CPU.type], took[device.type]
    figures.add(f"{what}, CPU, 1 thread", 1e3 * here, "ms", case)
    figures.add(f"{what}, GPU", 1e3 * there, "ms", case)
    figures.add(f"{what}, CPU over GPU", here / there, "x", case)


def tests(device: torch.device, figures: Figures, quick: bool, folder: Path) -> None:
    """The tests of another device, on this one."""
    file = folder / "tests.xml"
    chosen = ["tests/device/test_set_ups.py"] if quick else ["tests/device"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
         f"--junitxml={file}", "-o", "junit_family=xunit1", "-o", "addopts=", *chosen],
        cwd=ROOT, env={**os.environ, "LEAKATLAS_TEST_DEVICE": str(device)}, check=False,
    )  # fmt: skip
    figures.failed += done.returncode != 0
    suite = ET.parse(file).getroot()
    cases = list(suite.iter("testcase"))
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    note = f"{len(wrong)} failed, {skipped} skipped"
    figures.add(
        "tests on the device that pass", len(cases) - len(wrong) - skipped, "", "tests", note
    )
    for case in cases:
        for found in case.iter("property"):
            figures.add(
                case.attrib["name"].partition("[")[2].rstrip("]"), float(found.attrib["value"]),
                "", "attacks in float64, largest distance of an image",
            )  # fmt: skip
    for case in wrong:
        print(f"FAILED {case.attrib['classname']}::{case.attrib['name']}", flush=True)


def full(device: torch.device, figures: Figures, quick: bool, folder: Path) -> None:
    """Doctor and audits of networks at their real sizes; the longer audits last."""
    del figures
    file = folder / "full_size_cuda.json"
    for budget, names in (("30s", full_size.NETWORKS), ("120s", ("resnet18_group_norm",))):
        for name in names[:1] if quick else names:
            subprocess.run(
                [sys.executable, str(ROOT / "scripts" / "full_size.py"), "--only", name,
                 "--budget", "5s" if quick else budget, "--device", str(device),
                 "--result", str(file)],
                check=False,
            )  # fmt: skip


def merged(folder: Path, device: torch.device) -> None:
    """One result file of what the parts have written so far."""
    found = [
        figure
        for part in PARTS
        if (folder / f"{part}.figures.json").is_file()
        for figure in json.loads((folder / f"{part}.figures.json").read_text(encoding="utf-8"))
    ]
    facts = machine.facts(str(device))
    result = {
        "schema": "leakatlas/result/1",
        "kind": "benchmark",
        "key": "gpu",
        "code_version": 1,
        "recipe": {"networks": list(NETWORKS), "seconds": PARTS, "machine": facts},
        "hardware": machine.in_words(facts),
        "seeds": [SEED],
        "command": "python scripts/gpu.py",
        "date": datetime.now(UTC).date().isoformat(),
        "measures": found,
    }
    (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def one(part: str, device: torch.device, folder: Path, quick: bool) -> int:
    """Carry out a part in this process."""
    figures = Figures(folder / f"{part}.figures.json")
    torch.set_num_threads(1)
    match part:
        case "parity":
            parity(device, figures, quick)
        case "ratios":
            ratios(device, figures, quick)
        case "tests":
            tests(device, figures, quick, folder)
        case "full":
            full(device, figures, quick, folder)
    return figures.failed


def main() -> int:
    """The ratios first and alone; then parity and tests beside the full sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--seconds", type=float, default=570.0)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--quick", action="store_true", help="a few small things: for a trial")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = devices.chosen(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return one(options.part, device, options.out, options.quick)
    ends = time.monotonic() + options.seconds
    wanted = options.only or list(PARTS)

    def carried_out(lane: Sequence[str]) -> int:
        """Parts one after the other; how many failed."""
        failed = 0
        for part in [part for part in lane if part in wanted]:
            failed += 0 != in_time(
                [sys.executable, __file__, "--part", part, "--device", str(device),
                 "--out", str(options.out), *(["--quick"] if options.quick else [])],
                min(PARTS[part], ends - time.monotonic()), options.out / f"{part}.log",
            )  # fmt: skip
            merged(options.out, device)
        return failed

    failed = carried_out(["ratios"])  # alone: it is timed
    with ThreadPoolExecutor() as pool:
        failed += sum(pool.map(carried_out, [["parity", "tests"], ["full"]]))
    return bool(failed)


def in_time(command: Sequence[str], seconds: float, log: Path) -> int:
    """The exit code of a command that is ended, with its processes, when its time is over."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            code = 124
    print(f"{log.stem}: ended with {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
