"""What people met in daily use that no other file here is about."""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

import leakatlas
from leakatlas import defense, doctor
from leakatlas.audit.budget import Budget
from leakatlas.blocks.watch import Watch
from leakatlas.cli import app
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedSGD, Update

TESTS = Path(__file__).parents[1]


def _net() -> nn.Sequential:
    torch.manual_seed(31)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 9), nn.Tanh(), nn.Linear(9, 4))


def _batch(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(count, 3, 6, 6, generator=generator), torch.arange(count) % 4


def _gradients(model: nn.Module, *, reduction: str = "mean") -> list[Tensor]:
    images, labels = _batch()
    loss = nn.functional.cross_entropy(model(images), labels, reduction=reduction)
    return list(torch.autograd.grad(loss, list(model.parameters())))


# -- a client that trains with Opacus --------------------------------------------------------------


def test_a_model_that_opacus_wrapped_is_the_model_inside() -> None:
    grad_sample = pytest.importorskip("opacus.grad_sample")
    wrapped = grad_sample.GradSampleModule(_net())
    found = doctor(wrapped, _batch())
    assert found.replay.consistent
    assert any("GradSampleModule" in finding for finding in found.findings)
    names = {f"_module.{n}": g for n, g in zip(
        dict(_net().named_parameters()), _gradients(_net()), strict=True)}  # fmt: skip
    captured = Update.from_gradients(names, _net(), num_examples=3)
    check = doctor(_net(), _batch(), captured=captured).replay
    assert check.residual is not None and check.residual < 1e-6


def test_a_private_gradient_is_replayed_through_the_declared_defense() -> None:
    """Clipped and noisy, as DP-SGD sends it: the noise is named, not called a mistake."""
    model, norm = _net(), 0.05
    images, labels = _batch()
    clipped = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        loss = nn.functional.cross_entropy(model(x), y)
        each = torch.autograd.grad(loss, list(model.parameters()))
        size = torch.stack([g.square().sum() for g in each]).sum().sqrt()
        factor = min(1.0, norm / float(size))
        clipped = [c + factor * g / len(images) for c, g in zip(clipped, each, strict=True)]
    declared = [defense("client_dp", unit="example", clip_norm=norm, noise_multiplier=0.1)]
    update = Update.from_gradients(clipped, model, num_examples=3)
    bare = doctor(model, _batch(), captured=update).replay
    assert not bare.expected, "clipping was not noticed"
    generator = torch.Generator().manual_seed(1)
    noisy = [c + 0.1 * norm / 3 * torch.randn(c.shape, generator=generator) for c in clipped]
    update = Update.from_gradients(noisy, model, num_examples=3)
    found = doctor(model, _batch(), captured=update, defenses=declared).replay
    assert found.culprit == "defense" and found.expected and "adds noise" in found.explanation


# -- gradients that somebody scaled ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "culprit"), [(0.5, "scale"), (-1.0, "sign"), (-3.0, "sign"), (3.0, "reduction")]
)
def test_factors_and_signs_are_named(factor: float, culprit: str) -> None:
    update = Update.from_gradients([factor * g for g in _gradients(_net())], _net(), num_examples=3)
    found = doctor(_net(), _batch(), captured=update).replay
    assert found.culprit == culprit, found.explanation


def test_a_sum_that_is_said_to_be_one_is_consistent() -> None:
    update = Update.from_gradients(
        _gradients(_net(), reduction="sum"), _net(), num_examples=3, reduction="sum"
    )
    found = doctor(_net(), _batch(), captured=update, protocol=FedSGD(reduction="sum")).replay
    assert found.residual is not None and found.residual < 1e-6


# -- the same folder again, with more time ---------------------------------------------------------


def test_what_a_short_budget_left_is_not_taken_for_a_longer_ones(tmp_path: Path) -> None:
    config = {
        "model": {"builtin": "fc", "kwargs": {"size": 8, "widths": [8], "classes": 8}},
        "data": {"victims": "photos:8", "limit": 1},
        "threat": "B",
        "attacks": ["inverting_gradients"],
        "attack_parameters": {"inverting_gradients": {"steps": 3}},
        "rehearsal": False,
        "upper_bound": False,
    }
    file, out = tmp_path / "audit.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))

    def audited(budget: str) -> dict[str, Any]:
        arguments = ["audit", str(file), "--out", str(out), "--budget", budget]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code in (0, 3), done.output
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report

    short, long = audited("0.001s"), audited("1h")
    assert short["facts"]["budget_seconds"] == 0.001
    assert [run["status"] for run in short["runs"]] != ["complete"]
    assert long["facts"]["budget_seconds"] == 3600
    assert [run["status"] for run in long["runs"]] == ["complete"]


# -- one budget ------------------------------------------------------------------------------------


def test_diagnosis_and_comparisons_are_inside_the_budget() -> None:
    """A minute was asked for; diagnosis, attacks, the other verdict and comparisons share it."""
    stop, begun = Watch(), time.perf_counter() - 45.0
    budget = Budget(begun, 60.0, compares=True, other_side=0.2)
    parts = [budget.attacks(stop), budget.other_sides(stop), budget.comparisons(stop)]
    left = [part.remaining() or 0.0 for part in parts]
    assert left == sorted(left)
    assert max(left) <= 15.0, "what is over is over"


# -- tests that say nothing of the machine ---------------------------------------------------------


def test_no_test_holds_a_duration_against_a_number_of_seconds() -> None:
    """A busy machine must not fail a gate."""
    clocks = {"perf_counter", "monotonic", "process_time", "thread_time"}
    timed = []
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                calls = {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                if calls & clocks:
                    timed.append(f"{file.relative_to(TESTS)}:{node.lineno}")
    assert not timed


def test_unknown_devices_are_answered_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="it has: cpu"):
        leakatlas.audit(_net(), _batch(), device="cuda:77")
    file = tmp_path / "audit.yaml"
    file.write_text("model: {builtin: lenet}\ndevice: gpu\n")
    for command in ("audit", "doctor"):
        done = CliRunner().invoke(app, [command, str(file)])
        assert done.exit_code == 2 and "Unknown device 'gpu'" in done.output
    done = CliRunner().invoke(app, ["lint", "builtin:lenet", "--device", "cuda:77"])
    assert done.exit_code == 2 and "no device 'cuda:77'" in done.output.replace("\n", " ")
    done = CliRunner().invoke(app, ["bench", "smoke", "--device", "tpu"])
    assert done.exit_code == 2 and "Unknown device 'tpu'" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("resnet18", _batch()), "expected a torch.nn.Module with its weights, got str"),
        ((nn.Linear(2, 2, device="meta"), _batch()), "meta device"),
        ((_net(), _batch(), {"0.weight": 1.0}), "expected an Update or a Capture, got dict"),
    ],
)
def test_what_is_no_model_and_no_update_is_refused_in_words(
    arguments: tuple[Any, ...], words: str
) -> None:
    model, batch, *captured = arguments
    with pytest.raises(InvalidInput, match=words):
        leakatlas.doctor(model, batch, captured=captured[0] if captured else None)
