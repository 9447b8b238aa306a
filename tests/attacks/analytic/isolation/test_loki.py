from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.analytic.isolation.loki import LOKI, WEIGHT
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.blocks import readout
from leakatlas.data import Box
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.fl import FedAVG, FedSGD, Stage
from leakatlas.fl.edits import SplitImprint
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import (
    UNIT,
    alone_in_bin,
    errors,
    extremes,
    likeness,
    outermost,
    psnr,
    same_after_saving,
    small_stage,
)
from tests.attacks.case import LENET, Case
from tests.conftest import BOX

CASE = Case({"bins": 8}, {**LENET, "clients": 2})

AVERAGING = FedAVG(epochs=1, batch_size=2, lr=1e-2)


def _alone(trial: Trial, clients: int) -> Tensor:
    """From the true images: who has a bin of its own client to itself."""
    h = trial.truth.images.double().flatten(1).mean(dim=1)
    edges = trial.view.key["edges"]
    return torch.cat([alone_in_bin(part, edges) for part in h.chunk(clients)])


def _stage(**settings: object) -> Stage:
    chosen = {
        "letter": "G", "examples": 6, "clients": 8, "protocol": AVERAGING,
        "vantage": Vantage.AGGREGATE, **settings,
    }  # fmt: skip
    return small_stage(**chosen)  # type: ignore[arg-type]  # settings are those of small_stage


def test_every_clients_singletons_from_one_secure_fedavg_sum() -> None:
    """Eight clients, several local steps each, only a masked and quantised sum to read.

    At this kappa every hit leaves its band at once; see the test of kappa below.
    """
    stage = _stage(defenses=(SecureAggregation(ring_bits=64, clip_range=1e4),), size=8)
    trial = run_trial(stage, LOKI(bins=64, scale="anchor", kappa=1e4))
    alone = _alone(trial, 8)
    assert all(bool(part.any()) for part in alone.chunk(8))
    assert float(errors(trial)[alone].max()) < 1e-6
    assert all(trial.found.notes[f"candidates/client_{c}"] > 0 for c in range(8))


@pytest.mark.parametrize("box", [BOX, None], ids=["normalised", "plain"])
def test_anchored_rows_are_exact_for_singletons_and_wrong_for_collisions(box: object) -> None:
    settings = {} if box is None else {"box": box}
    trial = run_trial(_stage(protocol=FedSGD(), **settings), LOKI(bins=24, scale="anchor"))
    alone = _alone(trial, 8)
    assert 0 < int(alone.sum()) < len(alone)
    wrong = errors(trial)
    assert float(wrong[alone].max()) < 1e-6
    assert float(wrong[~alone].min()) > 1e-6


def test_the_midpoint_is_right_to_half_a_bin_and_better_than_the_maximum() -> None:
    scores = {}
    for scale in ("max", "midpoint"):
        trial = run_trial(_stage(), LOKI(bins=64, scale=scale))
        scores[scale] = psnr(trial)[_alone(trial, 8)]
    assert float(scores["midpoint"].median()) > 30
    assert float(scores["midpoint"].mean()) > float(scores["max"].mean())


def test_other_clients_columns_stay_exactly_zero_through_all_local_steps() -> None:
    _, records = observe(_stage(protocol=FedAVG(epochs=2, batch_size=2, lr=1e-2)), LOKI(bins=16))
    for position, update in enumerate(records[0].updates.values()):
        blocks = update.tensors[WEIGHT].chunk(8, dim=1)
        for index, block in enumerate(blocks):
            assert bool(block.any()) == (index == position)
        kernels = update.tensors["block.conv.weight"].chunk(8)
        assert all(bool(k.any()) == (i == position) for i, k in enumerate(kernels))


def test_the_sum_reads_like_each_client_alone() -> None:
    attack = LOKI(bins=32, scale="anchor")
    stage = _stage()
    view, records = observe(stage, attack)
    for block, update in zip(
        attack.blocks(view, 0, (3, 16, 16)), records[0].updates.values(), strict=True
    ):
        own = update.tensors[WEIGHT].chunk(8, dim=1)[block.client][:, : block.images.shape[1]]
        assert torch.allclose(block.images * 8, own, rtol=1e-12, atol=0)


def test_kappa_keeps_a_hit_from_being_overwritten() -> None:
    """Several epochs: at kappa = 1 a neuron stays in its band and collects what follows."""
    exact = {}
    for kappa in (1.0, 500.0):
        trial = run_trial(
            _stage(protocol=FedAVG(epochs=3, batch_size=2, lr=0.1)),
            LOKI(bins=48, kappa=kappa, scale="anchor"),
        )
        exact[kappa] = int((errors(trial) < 1e-4).sum())
    assert exact[500.0] > exact[1.0]


def test_the_forward_pass_does_not_depend_on_kappa() -> None:
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    w = torch.full((192,), 1 / 192, dtype=torch.float64)
    edges = torch.linspace(0, 1, 9, dtype=torch.float64)
    outputs = [
        SplitImprint(w, edges, shape=(3, 8, 8), clients=3, group=1, kappa=kappa).layers()(x)
        for kappa in (1.0, 500.0)
    ]
    assert torch.allclose(outputs[0], outputs[1])


def test_later_rounds_learn_the_brightness_of_the_clients() -> None:
    attack = LOKI(bins=32, scale="anchor", rounds=2)
    stage = _stage()
    view, _ = observe(stage, attack)
    assert len(view.rounds) == 2
    h = stage.pooled_truth().images.double().flatten(1).mean(dim=1)
    inner = view.rounds[1].key["edges"][1:-1]
    assert abs(float(inner.median() - h.mean())) < 0.1
    assert float(inner.max() - inner.min()) < 8 * float(h.std())
    once = len(LOKI(bins=32, scale="anchor")(view).images)
    assert len(attack(view).images) >= once > 0


@pytest.mark.parametrize("box", [UNIT, BOX], ids=["plain", "normalised"])
@pytest.mark.parametrize("scale", ["max", "midpoint", "anchor"])
@pytest.mark.parametrize("tone", ["dark", "bright"])
def test_lone_images_in_the_outermost_bins_are_read(scale: str, tone: str, box: Box) -> None:
    stage = _stage(victims=extremes(5, 6, tone), clients=5, box=box, protocol=FedSGD())
    trial = run_trial(stage, LOKI(bins=24, scale=scale))  # type: ignore[arg-type]  # parametrised literals
    outer = outermost(trial, tone)
    assert int(outer.sum()) == 5 and bool(_alone(trial, 5)[outer].all())
    assert float(likeness(trial)[outer].min()) > 1 - 1e-6


def test_a_client_that_sent_nothing_gives_nothing() -> None:
    attack = LOKI(bins=16)
    view, _ = observe(_stage(), attack)
    seen = view.rounds[0]
    assert seen.update is not None
    silent = seen.update.with_tensors({n: t * 0 for n, t in seen.update.tensors.items()})
    found = attack(view.with_rounds([replace(seen, update=silent)], dict(view.key)))
    assert found.status == "failed" and "no row" in found.reason


def test_copies_are_offered_once() -> None:
    attack = LOKI(bins=32, scale="anchor", rounds=2)
    view, _ = observe(_stage(), attack)
    images = attack(view).images
    kept = readout.distinct(images, torch.arange(len(images), dtype=torch.float64))
    assert len(kept) == len(images)


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    attack = LOKI(bins=16)
    view, _ = observe(_stage(clients=2), attack)
    same_after_saving(attack, view, tmp_path)
