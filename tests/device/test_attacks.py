"""Every attack on a pretended accelerator, where tensors of two devices cannot meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Reconstruction
from leakatlas.bench import harness
from leakatlas.catalogue import registry
from leakatlas.catalogue.loader import attack as row_of
from leakatlas.fl import tampering
from tests.attacks.case import Case
from tests.attacks.test_contract import CASES, SEED, TABLED
from tests.conftest import build_stage, surrogate
from tests.device.elsewhere import REAL, Elsewhere, near, pretended

KEYS = TABLED

LEARNED = {"gradvit": 5e-3}
"""Whose prior is learned in float32, step by step with Adam, however exact the update is: rounding
of 1e-6 in the learned weights moves the images by 1e-3."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKATLAS_CACHE", str(tmp_path_factory.getbasetemp() / "device"))
    monkeypatch.setattr(tampering, "PLAIN", (Tensor, nn.Parameter, Elsewhere))


def _found(key: str, device: torch.device) -> Reconstruction:
    case: Case = CASES[key]
    attack: Attack = registry.attack(key, **case.parameters)
    stage = build_stage(
        letter=row_of(key).threat_model,
        grants=attack.grants(),
        public=surrogate(int(case.scene.get("size", 8))),
        device=device,
        **case.scene,
    )
    view, _ = harness.observe(stage, attack)
    return attack(view, seed=SEED)


@pytest.mark.parametrize("key", KEYS)
def test_it_runs_where_its_view_is_and_finds_what_the_cpu_finds(
    key: str, record_property: Callable[[str, object], None]
) -> None:
    with pretended() as device:
        there = _found(key, device)
        assert there.images.device == device
        found = there.on_cpu()
    here = _found(key, torch.device("cpu"))
    assert found.status == here.status, found.reason
    off = (found.images - here.images).abs()
    record_property("largest deviation", float(off.max()) if off.numel() else 0.0)
    within = max(near(1e-6), LEARNED.get(key, 0.0)) if REAL else 1e-6
    torch.testing.assert_close(found.images, here.images, rtol=within, atol=within)
    for name in ("labels", "label_counts", "confidence"):
        a, b = getattr(found, name), getattr(here, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=near(1e-6), atol=near(1e-6))
