"""Every defense on a pretended accelerator: rounds, views and the adversary's mirror."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from leakatlas.catalogue import registry
from leakatlas.devices import CPU
from leakatlas.fl import Defense, FedAVG, FedSGD, ModelRef, Protocol, Scenario, View, stage
from leakatlas.threat import Vantage
from tests.conftest import BOX, photos
from tests.defenses.test_contract import (
    CLIENTS,
    EXAMPLES,
    OWN_RANDOMNESS,
    SIZE,
    accepts,
    network,
    usual,
)
from tests.device.elsewhere import near, pretended

PROTOCOLS: dict[str, Protocol] = {
    "fedsgd": FedSGD(),
    "fedavg": FedAVG(epochs=2, batch_size=1, lr=1e-5, momentum=0.5),
}


def _view(defense: Defense, protocol: Protocol, device: torch.device) -> View:
    """The second round of a federation that applies the first, as seen after aggregation.

    By a member of the cohort, where nobody else reads the mean.
    """
    scenario = Scenario(
        model=ModelRef("object", "network"),
        clients=CLIENTS,
        protocol=protocol,
        defenses=(defense,),
        letter="C",
        vantage=Vantage.PEER if defense.key == "homomorphic_encryption" else Vantage.AGGREGATE,
    )
    live = stage(
        scenario, model=network(), victims=photos(EXAMPLES * CLIENTS, SIZE), box=BOX,
        device=device,
    )  # fmt: skip
    live.federation.play_round(apply=True)
    record = live.federation.play_round()
    logits = live.federation.evaluation_model(1)(live.federation.clients[1].x)
    assert logits.device == device
    return live.view([record])


def _shown(view: View) -> dict[str, Tensor]:
    """What is seen, and what the adversary makes of a guess."""
    like = next(iter(view.update.tensors.values()))
    x = torch.rand(view.batch_shape, generator=torch.Generator().manual_seed(0)).to(like)
    x.requires_grad_()
    y = torch.arange(len(x), device=like.device) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        replayed: Mapping[str, Tensor] = view.replay(x, y)
    total = torch.stack([t.square().sum() for t in replayed.values()]).sum()
    (slope,) = torch.autograd.grad(total, x)
    assert all(t.device == like.device for t in (slope, *replayed.values()))
    found = {f"update/{n}": t for n, t in view.update.tensors.items()}
    found |= {f"replayed/{n}": t for n, t in replayed.items()}
    return {n: t.detach().cpu() for n, t in {**found, "slope": slope}.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("key", registry.defense_keys())
def test_it_acts_where_the_model_is_and_does_what_it_does_on_the_cpu(
    key: str, protocol: Protocol
) -> None:
    defense = usual(key)
    if not accepts(defense, protocol):
        pytest.skip("it does not act on several local steps")
    with pretended() as device:
        there = _shown(_view(defense, protocol, device))
    here = _shown(_view(defense, protocol, CPU))
    assert there.keys() == here.keys()
    within = near(1e-5 if key in OWN_RANDOMNESS else 1e-9)  # ciphertexts have their own noise
    for name, tensor in here.items():
        assert bool(torch.isfinite(tensor).all())
        torch.testing.assert_close(there[name], tensor, rtol=within, atol=within)
