"""A lean round opens what a whole round opens, and keeps nothing of a single client."""

from __future__ import annotations

import pytest
import torch

from leakatlas.attacks.analytic.isolation.loki import LOKI
from leakatlas.bench import harness, lean
from leakatlas.data import Box, patches
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.errors import InvalidInput
from leakatlas.fl import Defense, FedAVG, ModelRef, Scenario, Stage, stage
from leakatlas.threat import Vantage

CLIENTS, BATCH = 3, 4


def staged(*defenses: Defense) -> Stage:
    scenario = Scenario(
        model=ModelRef("builtin", "lenet", {"size": 8, "width": 4, "classes": 10}),
        examples=BATCH, clients=CLIENTS, protocol=FedAVG(epochs=1, batch_size=2, lr=0.01),
        defenses=defenses, letter="G", vantage=Vantage.AGGREGATE,
    )  # fmt: skip
    held = patches(8, CLIENTS * BATCH)
    public = patches(8, 64, part="surrogate")
    return stage(scenario, victims=held, surrogate=public, box=Box.unit(3))


@pytest.mark.parametrize("defenses", [(), (SecureAggregation(ring_bits=64),)])
def test_the_sum_is_that_of_a_whole_round(defenses: tuple[Defense, ...]) -> None:
    attack = LOKI(bins=8, scale="anchor")
    whole = harness.observe(staged(*defenses), attack)[1][0].aggregate
    view, (record,) = harness.observe(staged(*defenses), attack, lean=True)
    assert record.updates == {} and list(record.messages) == [0]
    assert record.aggregate.num_examples == whole.num_examples == CLIENTS * BATCH
    step = 0.0
    if defenses:  # both round stochastically, to a step of the ring
        step = 2 * 8.0 / SecureAggregation(ring_bits=64).levels_for(CLIENTS)
    for name, tensor in whole.tensors.items():
        gap = float((record.aggregate.tensors[name] - tensor).abs().max())
        assert gap <= 2 * step + 1e-6 * float(tensor.abs().max()), name
    assert view.update.num_examples == CLIENTS * BATCH


def test_its_candidates_are_those_of_a_whole_round() -> None:
    attack = LOKI(bins=8, scale="anchor")
    whole = harness.run_trial(staged(), attack)
    short = harness.run_trial(staged(), attack, lean=True)
    assert len(short.truth.images) == CLIENTS * BATCH
    assert torch.allclose(short.images, whole.images, atol=1e-4)


def test_other_defenses_are_refused() -> None:
    with pytest.raises(InvalidInput, match="no other defense; got clipping"):
        lean.play_round(staged(Clipping(max_norm=1.0)).federation, None)
