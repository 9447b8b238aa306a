from __future__ import annotations

import pytest
import torch

from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.defenses.formal.dp.opacus_dpsgd import OpacusDPSGD
from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import FedAVG, FedSGD, Protocol
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, readout_error, replayed

SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})
ROUNDS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedsgd, sum": FedSGD(reduction="sum"),
    "fedavg": FedAVG(epochs=2, batch_size=2, lr=0.1),
}


@pytest.mark.parametrize("protocol", ROUNDS.values(), ids=ROUNDS)
def test_at_next_to_no_noise_it_is_client_dp(protocol: Protocol) -> None:
    """Two ways to the same mechanism; Opacus adds 1e-6 to norms."""

    def sent(defense: OpacusDPSGD | ClientDP) -> dict[str, torch.Tensor]:
        stage = build_stage(model="lenet", examples=4, protocol=protocol, defenses=(defense,))
        return dict(stage.federation.play_round().updates[0].tensors)

    ours = sent(ClientDP(noise_multiplier=1e-12, clip_norm=0.3, clipping="flat"))
    theirs = sent(OpacusDPSGD(noise_multiplier=1e-12, max_grad_norm=0.3))
    assert relative_error(theirs, ours) < 1e-5


def test_noise_is_z_times_the_bound_over_the_batch() -> None:
    defense, settings = OpacusDPSGD(max_grad_norm=3), {"widths": (200,)}
    stage = build_stage(model="fc", settings=settings, examples=4, defenses=(defense,))
    stage.federation.play_round()
    noise = stage.federation.clients[0].memories["opacus_dpsgd"]["noise"]["hidden.1.weight"]
    assert float(noise.std()) == pytest.approx(3 / 4, rel=0.05)


def test_with_the_noise_one_example_is_an_exact_zero() -> None:
    view, x = observed(OpacusDPSGD(), model="lenet", grants=SECRET, examples=1)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-5  # the 1e-6 of norms
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.5


def test_it_is_accounted_without_amplification() -> None:
    defense = OpacusDPSGD()
    assert defense.epsilon(steps=1, delta=1e-5) == pytest.approx(4.377, abs=1e-2)
    assert defense.epsilon(steps=4, delta=1e-5) > defense.epsilon(steps=1, delta=1e-5)


def test_batch_normalisation_is_refused() -> None:
    with pytest.raises(IncompatibleDefenses, match="GroupNorm"):
        build_stage(model="convnet-bn", settings={"width": 4}, defenses=(OpacusDPSGD(),))


def test_the_model_is_left_as_it_was() -> None:
    stage = build_stage(model="lenet", defenses=(OpacusDPSGD(),))
    stage.federation.play_round()
    kinds = {type(m).__module__.split(".")[0] for m in stage.federation.model.modules()}
    assert "opacus" not in kinds
    assert all(p.grad is None for p in stage.federation.model.parameters())


def test_the_readout_fails() -> None:
    assert readout_error(OpacusDPSGD(noise_multiplier=0)) < 1e-9
    assert readout_error(OpacusDPSGD()) > 0.5
