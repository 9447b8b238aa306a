"""Doctor and a short audit of networks at their real sizes, as a user would run them.

    python scripts/full_size.py [--only vit_b_16] [--budget 30s] [--device cuda]

The gate tries the blocks of these networks as small as they go (tests/field); here they are whole:
224 pixels, 1,000 classes, random weights. Each is described by what ``leakatlas init`` writes. The
figures, exit codes and words go to ``results/full_size.json`` (``full_size_cuda.json`` of a GPU, or
where ``--result`` says), network by network; a traceback or
an exit code beyond those that the manual lists, or a budget overrun, ends the script with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from leakatlas.bench import machine

ROOT = Path(__file__).resolve().parents[1]
SEED, SIZE, CLASSES = 0, 224, 1000


class Mixer(nn.Module):
    """MLP-Mixer S/16 (Tolstikhin et al., 2021): layer normalisation, no attention."""

    def __init__(self, width: int = 512, tokens: int = 256, channels: int = 2048) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 16, 16)
        places = (SIZE // 16) ** 2
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "before": nn.LayerNorm(width),
                "tokens": nn.Sequential(
                    nn.Linear(places, tokens), nn.GELU(), nn.Linear(tokens, places)
                ),
                "between": nn.LayerNorm(width),
                "channels": nn.Sequential(
                    nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, width)
                ),
            })
            for _ in range(8)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits ``(N, K)`` of images ``(N, 3, 224, 224)``."""
        h: Tensor = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            h = h + block["tokens"](block["before"](h).transpose(1, 2)).transpose(1, 2)
            h = h + block["channels"](block["between"](h))
        out: Tensor = self.head(self.norm(h).mean(1))
        return out


class TwoInputs(nn.Module):
    """An image and a vector beside it: no image classifier, and refused in words."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = models.resnet18(num_classes=64), nn.Linear(64 + 8, CLASSES)

    def forward(self, x: Tensor, beside: Tensor) -> Tensor:
        """Class logits of images ``(N, 3, 224, 224)`` with vectors ``(N, 8)``."""
        out: Tensor = self.head(torch.cat([self.trunk(x), beside], dim=1))
        return out


def vit_b_16() -> nn.Module:
    """86.6 million parameters, attention."""
    return _seeded("vit_b_16")


def efficientnet_b0() -> nn.Module:
    """Depthwise convolutions, squeeze and excitation, stochastic depth, dropout."""
    return _seeded("efficientnet_b0")


def resnet50() -> nn.Module:
    """Bottlenecks with batch normalisation."""
    return _seeded("resnet50")


def convnext_tiny() -> nn.Module:
    """Convolutions with layer normalisation and stochastic depth."""
    return _seeded("convnext_tiny")


def swin_t() -> nn.Module:
    """Attention in shifted windows."""
    return _seeded("swin_t")


def resnet18_group_norm() -> nn.Module:
    """ResNet-18 as federated learning has it: group normalisation in place of batch statistics."""
    torch.manual_seed(SEED)
    made: nn.Module = models.resnet18(norm_layer=lambda width: nn.GroupNorm(32, width))
    return made


def mixer_s_16() -> nn.Module:
    """Layer normalisation alone."""
    torch.manual_seed(SEED)
    return Mixer()


def two_inputs() -> nn.Module:
    """Takes more than images."""
    torch.manual_seed(SEED)
    return TwoInputs()


def _seeded(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    made: nn.Module = models.get_model(name, weights=None)
    return made


NETWORKS = (
    "resnet18_group_norm", "efficientnet_b0", "mixer_s_16", "resnet50", "convnext_tiny", "swin_t",
    "vit_b_16",
)  # fmt: skip
REFUSED = ("two_inputs",)
BUDGET = "30s"


def command(*arguments: str) -> tuple[str, str, int, dict[str, float]]:
    """Run ``leakatlas``: output, errors, exit code, and what it took with its processes."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "leakatlas", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = {
        "wall": time.perf_counter() - begun,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "load": os.getloadavg()[0],
    }
    return done.stdout, done.stderr, done.returncode, took


def measure(name: str, value: float, unit: str, case: str, note: str = "") -> dict[str, Any]:
    """One figure of a result file."""
    return {"name": name, "case": case, "value": float(f"{value:.4g}"), "unit": unit,
            "interval": None, "n": 1, "note": note}  # fmt: skip


def tried(name: str, budget: str, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Figures of one network, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        config, wrong = f"{folder}/{name}.yaml", list[str]()

        def run(*arguments: str, expected: Sequence[int]) -> tuple[Any, int, dict[str, float]]:
            output, errors, code, took = command(*arguments)
            if "Traceback" in errors + output or code not in expected:
                wrong.append(f"{name}: leakatlas {arguments[0]} ended with {code}: {errors[-800:]}")
            return (json.loads(output) if output.startswith("{") else None), code, took

        run("init", config, "--model", f"{Path(__file__).resolve()}:{name}",
            "--victims", f"photos:{SIZE}", expected=[0])  # fmt: skip
        doctor, code, took = run("doctor", config, "--json", "--device", device, expected=[0])
        found = list[dict[str, Any]]()
        if doctor:
            diagnosis = next(iter(doctor.values()))
            residual = diagnosis["replay"]["residual"]
            words = Counter(start["verdict"] for start in diagnosis["outlooks"].values())
            crashed = [key for key, s in diagnosis["outlooks"].items() if s["verdict"] == "error"]
            wrong += [f"{name}: the outlook of {key} crashed" for key in crashed]
            found.append(measure("residual of the doctor", residual, "", name, _listed(words)))
            found.append(_cpu("doctor", code, took, name))
        report, code, took = run(
            "audit", config, "--budget", budget, "--device", device, "--json",
            "--out", f"{folder}/out", expected=[0, 1, 3],
        )  # fmt: skip
        if report:
            seconds = float(report["facts"]["budget_seconds"])
            allowed = measure("wall time of the audit over 1.1 budgets + 15 s",
                              took["wall"] / (1.1 * seconds + 15), "", name)  # fmt: skip
            wrong += [f"{name}: {run['attack']} crashed: {run['reason']}"
                      for run in report["runs"] if run["status"] == "error"]  # fmt: skip
            if allowed["value"] > 1:
                wrong.append(f"{name}: a budget of {budget} took {took['wall']:.0f} s")
            words = Counter(run["status"] for run in report["runs"])
            found += [_cpu("audit", code, took, name, _listed(words)), allowed]
            untried = [why for why in report["undecided"] if why.startswith("nothing was tried")]
            tested = Counter(str(v["verdict"]) for v in report["verdicts"])
            found.append(measure("letters with a verdict",
                                 sum(n for v, n in tested.items() if v != "not tested"),
                                 "", name, "; ".join([_listed(tested), *untried])))  # fmt: skip
        return found, wrong


def refused(name: str, device: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Figures of a network that is not for LeakAtlas, and what went wrong with saying so."""
    with tempfile.TemporaryDirectory() as folder:
        config, found, wrong = f"{folder}/{name}.yaml", list[dict[str, Any]](), list[str]()
        command("init", config, "--model", f"{Path(__file__).resolve()}:{name}",
                "--victims", f"photos:{SIZE}")  # fmt: skip
        for verb in ("doctor", "audit"):
            output, errors, code, took = command(verb, config, "--device", device)
            words = " ".join((output + errors).split())
            if code != 2 or "Traceback" in words:
                wrong.append(f"{name}: leakatlas {verb} ended with {code}: {words[-800:]}")
            found.append(_cpu(verb, code, took, name, words[:300]))
        return found, wrong


def _cpu(what: str, code: int, took: dict[str, float], name: str, more: str = "") -> dict[str, Any]:
    note = f"exit code {code}, {took['wall']:.0f} s of wall time at load {took['load']:.1f}"
    return measure(f"CPU time of the {what}", took["cpu"], "s", name,
                   note + (f"; {more}" if more else ""))  # fmt: skip


def _listed(words: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(words.items()))


def main() -> int:
    """Try the networks, and keep the figures of those that were not asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=(*NETWORKS, *REFUSED), action="append")
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    kind = options.device.partition(":")[0]
    key = "full_size" if kind == "cpu" else f"full_size_{kind}"
    file = options.result or ROOT / "results" / f"{key}.json"
    held = json.loads(file.read_text(encoding="utf-8"))["measures"] if file.is_file() else []
    failures = []
    order = {name: place for place, name in enumerate((*NETWORKS, *REFUSED))}
    for name in options.only or order:
        if name in REFUSED:
            found, wrong = refused(name, options.device)
        else:
            found, wrong = tried(name, options.budget, options.device)
        failures += wrong
        case = name if options.budget == BUDGET else f"{name}, {options.budget}"
        found = [{**one, "case": case} for one in found]
        held = [m for m in held if m["case"] != case] + found
        for one in found:
            print(f"{case}: {one['name']} {one['value']} {one['unit']} ({one['note']})", flush=True)
        result = {
            "schema": "leakatlas/result/1",
            "kind": "benchmark",
            "key": key,
            "code_version": 1,
            "recipe": {"image": SIZE, "batch": 2, "classes": CLASSES, "budget": options.budget,
                       "machine": machine.facts(options.device)},
            "hardware": machine.in_words(machine.facts(options.device)),
            "seeds": [SEED],
            "command": "python scripts/full_size.py",
            "date": datetime.now(UTC).date().isoformat(),
            "measures": sorted(held, key=lambda m: order[m["case"].partition(",")[0]]),
        }  # fmt: skip
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(failures), file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
