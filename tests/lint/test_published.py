"""The checks rebuilt from two published detectors, and the failures that their ideas predict."""

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from leakatlas import models
from leakatlas.blocks import readout
from leakatlas.data import bundled
from leakatlas.fl import Client, FedAVG, Federation, edits, model_state
from leakatlas.lint import Dynamics, Score, dynamics, lint, published
from leakatlas.lint.layers import Layer, anatomy

SIZE = 8
OWN = bundled.patches(SIZE, 8)


def layer(weight: Tensor) -> Layer:
    return Layer("fc", "fc.weight", weight, None)


def one(scores: list[Score], statistic: str) -> Score:
    found = [score for score in scores if score.statistic == statistic]
    assert len(found) == 1
    return found[0]


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


# -- D15 -------------------------------------------------------------------------------------------


def test_d15_is_one_for_binning_rows_and_within_chance_for_drawn_ones() -> None:
    weight, _ = edits.binning_rows(drawn(1, 192)[0], readout.bin_edges("normal", 64), "cumulative")
    assert one(published.d15_improbable_rows(layer(weight)), "D15/improbable").value == (
        pytest.approx(1)
    )
    found = one(published.d15_improbable_rows(layer(drawn(64, 192))), "D15/improbable")
    limit = float(found.words.split("below ")[1].split(" ")[0])
    assert found.value < limit < 0.6


def test_what_chance_allows_is_what_chance_does() -> None:
    """cos^2 of two drawn rows follows Beta(1/2, (n-1)/2): its 99 % point, counted."""
    n, rows = 12, drawn(40_000, 24, 1)
    cosine = nn.functional.cosine_similarity(rows[:, :n], rows[:, n:]).abs()
    limit = math.sqrt(float(stats.beta.isf(0.01, 0.5, (n - 1) / 2)))
    assert float((cosine > limit).double().mean()) == pytest.approx(0.01, abs=0.002)


def test_d15_does_not_see_traps_nor_one_copied_row() -> None:
    """Nothing in its idea looks for values shuffled within a row, or for a pair among many."""
    weight = drawn(64, 192)
    weight[1] = weight[0]
    assert published.d15_improbable_rows(layer(weight))[0].value < 0.6
    assert published.d15_improbable_rows(layer(torch.ones(4, 4))) == []


# -- D16 -------------------------------------------------------------------------------------------

STEADY = [Dynamics(2.3, 1.0), Dynamics(2.2, 1.1), Dynamics(2.1, 0.9), Dynamics(2.0, 1.0)]


def test_d16_counts_rises_in_the_history_s_own_deviations() -> None:
    logs = torch.tensor([2.3, 2.2, 2.1, 2.0], dtype=torch.float64).log()
    z = (math.log(8.0) - float(logs.mean())) / max(float(logs.std()), published.STEADY)
    found = published.d16_dynamics(Dynamics(8.0, 1.0), STEADY)
    assert one(found, "D16/loss").value == pytest.approx(z / (3 + z))
    assert one(found, "D16/gradient").value < 0.05
    jump = published.d16_dynamics(Dynamics(2.0, 1e6), STEADY)
    assert one(jump, "D16/loss").value == 0 and one(jump, "D16/gradient").value > 0.9


def test_d16_lets_a_fall_pass_and_needs_three_rounds() -> None:
    assert all(s.value == 0 for s in published.d16_dynamics(Dynamics(1e-9, 1e-9), STEADY))
    assert published.d16_dynamics(Dynamics(9.0, 9.0), STEADY[:2]) == []


def test_d16_of_numbers_out_of_range_is_not_finite_and_so_an_alarm() -> None:
    assert math.isnan(published.d16_dynamics(Dynamics(math.nan, 1.0), STEADY)[0].value)
    assert published.d16_dynamics(Dynamics(math.inf, 1.0), STEADY)[0].value == 1


# -- D17 -------------------------------------------------------------------------------------------


def changed(a: Tensor, b: Tensor) -> float:
    found = published.d17_change(anatomy({"fc.weight": a}), anatomy({"fc.weight": b}))
    return one(found, "D17/change").value


def test_d17_is_the_turn_of_a_layer() -> None:
    a = drawn(16, 16)
    b = a + drawn(16, 16, 1)
    assert changed(a, a) == pytest.approx(0, abs=1e-7)
    assert changed(3e20 * a, a) == pytest.approx(0, abs=1e-3)  # size says nothing
    unit_a, unit_b = a.double() / a.double().norm(), b.double() / b.double().norm()
    assert changed(a, b) == pytest.approx(float((unit_a - unit_b).norm()) / math.sqrt(2))
    assert changed(-a, a) == 1 and changed(torch.zeros(16, 16), a) == 0


def test_d17_counts_what_was_not_there_as_new() -> None:
    before = {"fc.weight": drawn(16, 16)}
    after = {"block.weight": drawn(16, 16, 1), **before}
    found = one(published.d17_change(anatomy(after), anatomy(before)), "D17/change")
    assert found.value == 1 and found.place == "block" and "not there before: block" in found.words


def test_a_slow_server_passes_d17() -> None:
    """The failure that its idea predicts: a small turn a round, and traps after some rounds."""
    model, target = drawn(32, 32), drawn(32, 32, 1)
    steps = [(1 - t / 50) * model + t / 50 * target for t in range(51)]
    assert max(changed(b, a) for a, b in itertools.pairwise(steps)) < 0.1
    assert changed(steps[-1], steps[0]) > 0.9


# -- together --------------------------------------------------------------------------------------


def test_honest_rounds_pass_and_an_imprint_after_them_does_not() -> None:
    clients = {c: Client(s.images, s.labels) for c, s in enumerate([OWN, bundled.patches(SIZE, 8)])}
    model = models.build("convnet", size=SIZE, width=4)
    federation = Federation(model, clients, FedAVG(batch_size=4, lr=0.02))
    history = [dynamics(federation.model, OWN)]
    for _ in range(4):
        before = model_state(federation.model)
        federation.play_round(apply=True)
        verdict = lint(federation.model, previous=before, batch=OWN, history=history)
        assert not verdict.alarm
        assert ("D16/loss" in verdict.scores) == (len(history) >= 3)
        assert ("D16" in verdict.skipped) == (len(history) < 3)
        history.append(dynamics(federation.model, OWN))
    n = 3 * SIZE * SIZE
    edit = edits.Imprint(torch.full((n,), 1 / n), readout.bin_edges("normal", 64))
    tampered = edits.Imprinted(edit.layers(), federation.model)
    verdict = lint(tampered, previous=before, batch=OWN, history=history)
    assert {"D1", "D15", "D17"} <= set(verdict.checks)
    # An agreed architecture with weights of its own is no model of the round before.
    agreed = models.build("convnet", size=SIZE, width=4, seed=9)
    assert "D17/change" not in lint(federation.model, reference=agreed).scores
