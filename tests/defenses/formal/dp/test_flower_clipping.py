from __future__ import annotations

import math

import pytest
import torch

from leakatlas.defenses.formal.dp.flower_clipping import FlowerClipping
from leakatlas.errors import InvalidParameter
from leakatlas.fl import Stage
from leakatlas.threat import Vantage
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import observed, readout_error, replayed


def three(defense: FlowerClipping | None, **settings: object) -> Stage:
    defenses = () if defense is None else (defense,)
    return build_stage(model="lenet", clients=3, defenses=defenses, **settings)  # type: ignore[arg-type]


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors.values()]).norm())


def test_clients_clip_and_only_the_mean_is_noisy() -> None:
    stage = three(FlowerClipping(clipping_norm=0.05))
    record = stage.federation.play_round()
    for update in record.updates.values():
        assert norm(dict(update.tensors)) == pytest.approx(0.05)
    mean = {
        name: torch.stack([u.tensors[name] for u in record.updates.values()]).mean(0)
        for name in record.aggregate.tensors
    }
    noise = torch.cat([(record.aggregate.tensors[n] - t).flatten() for n, t in mean.items()])
    assert float(noise.std()) == pytest.approx(0.05 / 3, rel=0.1)
    assert record.messages[0].update is record.updates[0]  # the server sees it without noise


def test_the_bound_follows_the_quantile() -> None:
    defense = FlowerClipping(adaptive=True, clipping_norm=1e-3, count_std=1.0, noise_multiplier=0.5)
    assert defense.moved(1.0, 0.5) == 1.0
    assert defense.moved(1.0, 1.0) == pytest.approx(math.exp(-0.2 * 0.5))
    stage = three(defense)
    bounds = []
    for _ in range(4):
        stage.federation.play_round()
        bounds.append(stage.federation.server_memories["flower_clipping"]["bound"])
    assert bounds[0] == 1e-3
    assert bounds[3] != bounds[0]  # the share is noisy: three clients and a noise of 1


def test_without_noise_on_the_count_everybody_clipped_lowers_it() -> None:
    """All are clipped: the bound shrinks, as the release has it, towards the wrong side."""
    stage = three(
        FlowerClipping(adaptive=True, clipping_norm=1e-3, noise_multiplier=1e-9, count_std=1e-6)
    )
    for _ in range(2):
        stage.federation.play_round()
    bound = stage.federation.server_memories["flower_clipping"]["bound"]
    assert bound == pytest.approx(1e-3 * math.exp(-0.1), rel=1e-3)


def test_the_count_spends_a_part_of_the_budget() -> None:
    defense = FlowerClipping(adaptive=True, noise_multiplier=1.0, count_std=2.0)
    assert defense.multiplier(10) == pytest.approx((1 - 1 / 16) ** -0.5)
    assert FlowerClipping(noise_multiplier=1.0).multiplier(10) == 1.0
    with pytest.raises(InvalidParameter, match="count_std"):
        three(FlowerClipping(adaptive=True)).federation.play_round()


def test_towards_the_server_it_is_a_factor() -> None:
    assert readout_error(FlowerClipping()) < 1e-9
    view, x = observed(FlowerClipping(clipping_norm=0.05))
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9
    assert relative_error(replayed(view, x, adaptive=False), view.update.tensors) > 0.1


def test_towards_the_others_it_is_noise() -> None:
    stage = three(FlowerClipping(clipping_norm=0.05), vantage=Vantage.AGGREGATE)
    view = stage.view([stage.federation.play_round()])
    plain = three(None, vantage=Vantage.AGGREGATE)
    reference = plain.view([plain.federation.play_round()]).update.tensors
    assert relative_error(view.update.tensors, reference) > 0.1
