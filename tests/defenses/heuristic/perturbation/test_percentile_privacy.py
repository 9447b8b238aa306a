from __future__ import annotations

import numpy as np
import pytest
import torch

from leakatlas.defenses.heuristic.perturbation.percentile_privacy import (
    PercentilePrivacy,
    filtered,
)
from leakatlas.fl import FedAVG, FedSGD, Protocol
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, an_update, ledger, observed, replayed

ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(lr=0.5), "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.5)
}  # fmt: skip


def changes() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": 0.01 * torch.randn(30, 20, generator=generator, dtype=torch.float64),
        "b": 0.01 * torch.randn(20, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(7.0, dtype=torch.float64),
    }


def test_small_changes_go_and_large_ones_are_truncated() -> None:
    given = changes()
    sent = filtered(given, 0.01, 30)
    every = np.concatenate([t.numpy().ravel() for t in given.values()])
    cutoff = np.percentile(np.abs(every), 30)
    for name in ("w", "b"):
        v = given[name].numpy()
        expected = np.where(np.abs(v) < cutoff, 0, np.clip(v, -0.01, 0.01))
        np.testing.assert_allclose(sent[name].numpy(), expected)
    assert float(sent["scalar"]) == 7.0


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_the_bound_holds_for_the_change_of_a_single_step(protocol: Protocol) -> None:
    defense = PercentilePrivacy(gamma=1e-4)
    stage = build_stage(model="lenet", protocol=protocol, examples=3, defenses=(defense,))
    update = stage.federation.play_round().updates[0]
    steps = protocol.steps(3) if isinstance(protocol, FedAVG) else 1
    largest = max(float(t.abs().max()) for t in update.tensors.values())
    change = largest * (protocol.lr if update.kind == "gradient" else 1 / steps)
    assert change == pytest.approx(1e-4)


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_the_true_batch_matches(protocol: Protocol) -> None:
    view, x = observed(PercentilePrivacy(gamma=1e-3, percentile=40), protocol=protocol)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.05


def test_slopes_pass_the_truncation() -> None:
    defense = PercentilePrivacy(gamma=0.005, percentile=0)
    given = {"w": changes()["w"].requires_grad_()}
    seen = defense.update(an_update({"w": given["w"].detach()}), a_context())
    mirrored = defense.simulate(given, torch.empty(0), torch.empty(0), seen)["w"]
    (slope,) = torch.autograd.grad(mirrored.sum(), given["w"])
    assert bool((slope[seen.tensors["w"] != 0] == 1).all())


def test_the_shipped_settings_keep_most_of_the_direction() -> None:
    """Where most changes are below the bound, as a round's usually are."""
    given = {"w": changes()["w"]}
    sent = PercentilePrivacy().update(an_update(given), a_context()).tensors
    cosine, size = ledger(sent, given)
    assert 0.7 < cosine < 1
    assert size < 1
