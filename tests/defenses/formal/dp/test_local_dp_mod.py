from __future__ import annotations

import math

import pytest
import torch

from leakatlas.audit.promises import Promise
from leakatlas.defenses.formal.dp.local_dp_mod import LocalDpMod
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import a_context, an_update, observed, readout_error, replayed

SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})
ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(mode="train"), "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.1)
}  # fmt: skip


def test_sigma_is_that_of_the_classical_mechanism() -> None:
    assert LocalDpMod(sensitivity=2.0, epsilon=0.5).sigma == pytest.approx(
        2 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
    )


def test_what_it_is_worth_is_what_the_doctor_says_of_a_recorded_run() -> None:
    defense = LocalDpMod(epsilon=2.0, clipping_norm=1.5, sensitivity=1.0)
    promise = Promise(epsilon=2.0, delta=1e-5, sensitivity=1.0, clipping_norm=1.5)
    assert defense.worth(rounds=3) == pytest.approx(promise.worth(3))
    assert defense.worth() > defense.epsilon  # sensitivity is a third of what it must be
    proper = LocalDpMod(epsilon=0.5, clipping_norm=1.0, sensitivity=2.0)
    assert proper.worth() <= proper.epsilon


def test_the_norm_is_bounded_before_the_noise() -> None:
    v = {"w": 100 * torch.ones(20, 30, dtype=torch.float64)}
    context = a_context()
    sent = LocalDpMod(clipping_norm=0.5).update(an_update(v), context).tensors["w"]
    clean = sent - context.memory["noise"]["w"]
    assert float(clean.norm()) == pytest.approx(0.5)
    assert float(context.memory["noise"]["w"].std()) == pytest.approx(4.84, rel=0.1)


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_buffers_are_withheld(protocol: Protocol) -> None:
    stage = build_stage(
        model="convnet-bn", settings={"width": 4}, defenses=(LocalDpMod(),), protocol=protocol
    )
    assert stage.federation.play_round().updates[0].buffers_after == {}


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_with_the_noise_the_true_batch_is_an_exact_zero(protocol: Protocol) -> None:
    view, x = observed(LocalDpMod(), protocol=protocol, grants=SECRET, model="lenet")
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.5


def test_the_readout_fails() -> None:
    assert readout_error(LocalDpMod(epsilon=float("inf"))) < 1e-9
    assert readout_error(LocalDpMod()) > 0.5
