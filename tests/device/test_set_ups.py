"""A whole set-up on a pretended accelerator: doctor, measures, labels, lint, audit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leakatlas import devices, models
from leakatlas.audit import Plan, carry_out, examine, presets
from leakatlas.bench import schema as studies
from leakatlas.bench import utility
from leakatlas.bench.cells import Cell
from leakatlas.fl import FedAVG, FedSGD, Protocol, tampering
from leakatlas.lint import lint
from leakatlas.threat import Grant
from leakatlas.vulnerability import Case, assess
from tests.audit.conftest import small_plan as small_plan
from tests.conftest import build_stage, surrogate
from tests.device.elsewhere import Elsewhere, alike, near, pretended


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tampering, "PLAIN", (Tensor, nn.Parameter, Elsewhere))


PROTOCOLS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.05, mode="train", optimizer="adam"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("model", ["convnet-bn", "vit"])
def test_the_doctor_says_the_same(model: str, protocol: Protocol) -> None:
    settings = {"dim": 8, "patch": 4, "heads": 2, "depth": 1} if model == "vit" else {"width": 4}

    def diagnosed(device: torch.device) -> dict[str, object]:
        live = build_stage(
            model=model, settings=settings, protocol=protocol, examples=4, letter="G",
            public=surrogate(8), grants=frozenset(Grant), device=device,
        )  # fmt: skip
        found = examine(live, presets(None, {}, published=False), letters=("A", "C", "E", "G"))
        return found.to_json()

    with pretended() as device:
        there = diagnosed(device)
    assert alike(there, diagnosed(devices.CPU))


def test_every_measure_has_the_same_value() -> None:
    def measured(device: torch.device) -> list[dict[str, object]]:
        live = build_stage(public=surrogate(8), device=device)
        return [m.to_json() for m in assess(Case.of_stage(live), tier="spectral", limit=8, steps=5)]

    with pretended() as device:
        there = measured(device)
    here = measured(devices.CPU)
    for a, b in zip(there, here, strict=True):
        assert a["name"] == b["name"] and alike(a["note"], b["note"])
        assert a["value"] == pytest.approx(b["value"], rel=near(1e-6), abs=near(1e-9), nan_ok=True)


@pytest.mark.parametrize("update", [False, True])
def test_lint_judges_alike(update: bool) -> None:
    x, y = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    model = models.build("convnet", size=8, width=4, classes=4)
    honest = models.build("convnet", size=8, width=4, classes=4, seed=1)
    with torch.no_grad():
        model.get_parameter("fc.weight")[1:] *= 1e-4
    here = lint(model, reference=honest, batch=(x, y) if update else None, device="cpu")
    with pretended() as device:
        there = lint(model, reference=honest, batch=(x, y) if update else None, device=device)
    assert alike(there.to_json(), here.to_json())


def test_an_audit_finds_the_same_and_says_where(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = replace(small_plan, seconds=None, in_process=True)
    here = carry_out(plan, out=tmp_path / "here")
    with pretended() as device:
        there = carry_out(plan.on(device), out=tmp_path / "there")
    assert there.facts["device"] == devices.in_words(device) and here.facts["device"] == "cpu"
    for a, b in zip(there.runs, here.runs, strict=True):
        assert a.status == b.status, a.reason
        assert a.verdict == b.verdict
        assert a.recipe["conditions"]["device"] == device.type
        assert b.recipe["conditions"]["device"] == "cpu"
        assert (a.scores is None) == (b.scores is None)
    assert any(run.scores is not None for run in there.runs)


TRAINED_UNDER = ["gradient_pruning", "client_dp", "fragmented_fl", "quantization", "precode"]


@pytest.mark.parametrize("key", [None, *TRAINED_UNDER])
def test_a_federation_trains_to_the_same_accuracy(key: str | None) -> None:
    """Without an attack clients and server compute where the cell says."""
    case = studies.Case.model_validate(
        {
            "model": {"builtin": "fc", "kwargs": {"in_channels": 1, "size": 8, "widths": [16]}},
            "victims": {"set": "digits", "count": 1},
            "protocol": {"algorithm": "fedavg", "mode": "train", "batch_size": 8, "lr": 0.1},
            "defenses": [] if key is None else [{"key": key}],
            "measures": [{"name": "accuracy"}],
            "utility": {
                "train": {"set": "digits", "count": 64},
                "test": {"set": "digits", "first": 64, "count": 40},
                "rounds": 2, "rates": [0.1], "clients": 4, "split": 0.5,
            },
        }
    )  # fmt: skip
    with pretended() as device:
        here, there = (
            utility.measure(Cell("here", "main", case, 0, 0, device=where))
            for where in ("cpu", str(device))
        )
    assert alike(there, here)
