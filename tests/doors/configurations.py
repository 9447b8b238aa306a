"""What people write: audits and studies."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from leakatlas import models
from leakatlas.audit.config import make_plan, read_config
from leakatlas.audit.plan import presets
from leakatlas.bench import study
from leakatlas.report import parse_gate
from tests.doors.hostile import as_json, damaged, tampered
from tests.doors.registry import Files, command, door, one
from tests.doors.seeds import saved, update_of_a_client

MODEL = {"builtin": "fc", "kwargs": {"in_channels": 3, "size": 8, "classes": 8, "widths": [4]}}
CONFIGURATIONS: tuple[Any, ...] = (
    {
        "model": MODEL,
        "data": {
            "victims": "photos:8",
            "limit": 2,
            "surrogate": "patches:8:8:surrogate",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
        },
        "protocol": {"algorithm": "fedavg", "epochs": 2, "batch_size": 2, "lr": 0.01},
        "clients": 2,
        "targets": [0, 1],
        "vantage": "server",
        "grants": ["labels"],
        "defenses": [{"key": "clipping", "max_norm": 1.0}],
        "alternatives": {
            "all": [
                {"key": "precode", "latent": 8},
                {"key": "soteria"},
                {"key": "client_dp", "unit": "update", "clip_norm": 1.0, "noise_multiplier": 0.1},
                {"key": "secure_aggregation", "ring_bits": 64},
                {"key": "fedkl", "key_length": 16},
                {"key": "vicinal_augmentation"},
                {"key": "central_dp", "clip_norm": 1.0, "noise_multiplier": 0.1},
            ],
            "pruned": [{"key": "gradient_pruning", "rate": 0.9}],
        },
        "threat": "A-C",
        "attacks": ["inverting_gradients", "dlg"],
        "attack_parameters": {"inverting_gradients": {"steps": 3, "restarts": 2}},
        "budget": "10s",
        "seed": 0,
        "execution": "eager",
        "upper_bound": False,
        "context": {
            "purpose": "classifying",
            "controllers": ["A"],
            "special_categories": True,
            "adversaries": {"C": "the aggregator"},
            "rounds": 3,
            "delta": 1e-6,
            "expires": "2030-01-31",
        },
        "fail_on": ["P(psnr > 20 dB) > 0.05"],
    },
    {
        "model": {"builtin": "lenet", "kwargs": {"size": 8, "classes": 8}, "weights": "w.pt"},
        "data": {"victims": "folder:pictures@8"},
        "captured": "update.safetensors",
    },
    {
        "model": {"python": "net.py:make", "kwargs": {"width": 4}},
        "data": {"victims": "digits:8"},
        "protocol": {
            "algorithm": "fedavg",
            "augment": ["RandomHorizontalFlip", {"name": "RandomRotation", "degrees": 9}],
            "loss": "cross_entropy",
        },
    },
)

TENFOLD = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in itertools.pairwise("abcdefghij")
)
"""Nine levels of ten aliases each."""

SNIPPETS = (
    TENFOLD,
    "[" * 3000,
    "{a: " * 500,
    "a: &a [*a]",
    "a: &a {b: *a}",
    "!!python/object/apply:os.mkdir [x]",
    "!!python/name:os.system",
    "x: !!int abc",
    "seed: 2001-99-99",
    "? [a]\n: b",
    "a: *b",
    "- \t-",
    "--- a\n--- b",
    "%TAG ! tag:x,2000:\n--- !x y",
    "a: |\n x",
    "a: !!set {b}",
    "key: !!null x",
    "&a a: &b b",
    "<<: [{a: 1}]",
    "a: " + "9" * 5000,
    "\ufeffa: 1",
    "a: !!float 1__0",
    "@",
    "`",
)


def _yaml(documents: tuple[Any, ...]) -> st.SearchStrategy[bytes]:
    """JSON is YAML; text that is neither comes from snippets and damage."""
    whole = tuple(json.dumps(d, indent=1).encode() for d in documents)
    joined = st.builds(
        lambda head, tail: head + b"\n" + tail.encode("utf-8", "replace"),
        st.sampled_from((b"", b"model: {builtin: fc}", b"seed: 1")),
        st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=30)),
    )
    likely = tampered(documents).map(as_json)
    return st.one_of(likely, likely, likely, damaged(whole), joined)


NET = (
    b"from torch import nn\n"
    b"def make(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
)


def _beside() -> Files:
    """What the configurations name: code, a picture, weights, a captured update."""
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7)).save(buffer, "PNG")
    lenet = models.build("lenet", size=8, classes=8).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        update_of_a_client().save(Path(folder) / "u")
        captured = (Path(folder) / "u").read_bytes()
    return {
        "net.py": NET,
        "pictures/a/1.png": buffer.getvalue(),
        "w.pt": saved(lenet),
        "update.safetensors": captured,
    }


BESIDE = _beside()


@door(
    _yaml(CONFIGURATIONS).map(lambda text: {"audit.yaml": text, **BESIDE}),
    share=3.0,
)
def configuration(folder: Path) -> object:
    """``leakatlas audit audit.yaml``, up to the first gradient."""
    config = read_config(folder / "audit.yaml")
    for condition in config.fail_on:
        parse_gate(condition)
    plan = make_plan(config, base=folder, command="")
    for setting in plan.settings:
        presets(setting.attacks, plan.attack_parameters, published=False)
        setting.stage(letter=plan.letters[0], seed=plan.seed)
    return plan


DIAGNOSED = tuple(
    {**CONFIGURATIONS[0], "attacks": ["inverting_gradients"], "protocol": protocol}
    for protocol in (CONFIGURATIONS[0]["protocol"], {"algorithm": "fedsgd"})
)


@door(one("audit.yaml", tampered(DIAGNOSED).map(as_json)), share=0.5, examples=6)
def doctor(folder: Path) -> object:
    """``leakatlas doctor audit.yaml``, as typed."""
    return command("doctor", str(folder / "audit.yaml"))


STUDIES: tuple[Any, ...] = (
    {
        "schema": "leakatlas/study/1",
        "title": "A study",
        "question": "Does it leak?",
        "chosen": "nothing",
        "setup": {
            "model": {"builtin": "fc", "kwargs": {"size": 8}},
            "victims": "photos:8",
            "protocol": {"algorithm": "fedsgd"},
            "batch": 1,
            "letter": "C",
            "attack": {"key": "dlg", "parameters": {"steps": 3}},
            "measures": ["psnr"],
        },
        "axes": {"batch": [1, 2], "defense": {"none": {"defenses": []}}},
    },
)


@door(one("s/study.yaml", _yaml(STUDIES)))
def study_file(folder: Path) -> object:
    """``leakatlas bench study.yaml``, up to its cases."""
    return study.load(folder / "s" / "study.yaml")
