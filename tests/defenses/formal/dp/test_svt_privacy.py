from __future__ import annotations

import math

import pytest
import torch

from leakatlas.defenses.formal.dp.svt_privacy import SVTPrivacy
from leakatlas.fl import Trait
from leakatlas.threat import Grant
from tests.conftest import relative_error
from tests.defenses.heuristic.probes import a_context, an_update, ledger, observed, replayed

SECRET = frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def silent(scale: float, size: int) -> torch.Tensor:
    del scale
    return torch.zeros(size, dtype=torch.float64)


def first(accepted: torch.Tensor, size: int) -> torch.Tensor:
    return accepted[:size]


def test_without_noise_the_entries_above_the_threshold_are_sent_truncated() -> None:
    d = torch.tensor([0.0, 5.0, -5.0, 0.4, -0.3, 0.1, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    defense = SVTPrivacy(gamma=1.0, fraction=0.4, tau=0.2)
    sent = defense.released(d, silent, first)
    assert sent.tolist() == [0, 1, -1, 0.4, -0.3, 0, 0, 0, 0, 0]


def test_the_shipped_budget_grows_with_the_number_of_weights() -> None:
    defense = SVTPrivacy()
    assert defense.spent(7_033_290) == pytest.approx(70_333, abs=1)
    assert defense.spent(1000, rounds=3) == pytest.approx(3 * 10.1)
    assert defense.uploaded(11) == math.ceil(1.1)


def test_a_tenth_is_sent_at_most_and_noise_is_twenty_times_the_bound() -> None:
    v = {"w": draw(200, 100)}
    sent = SVTPrivacy(replace=False).update(an_update(v), a_context()).tensors["w"]
    chosen = sent != 0
    assert int(chosen.sum()) == 2000
    expected = 2 * 1e-5 / 0.1 / 0.1  # the change is that of a step of rate 0.1
    assert float(sent[chosen].abs().mean()) == pytest.approx(expected, rel=0.1)
    repeated = SVTPrivacy().update(an_update(v), a_context()).tensors["w"]
    assert 0.55 * 2000 < int((repeated != 0).sum()) < 2000  # 1 - 1/e of what may be accepted


def test_at_the_shipped_settings_the_direction_is_lost() -> None:
    v = {"w": draw(200, 100)}
    sent = SVTPrivacy().update(an_update(v), a_context()).tensors
    assert abs(ledger(sent, v)[0]) < 0.05


def test_scalars_pass_as_in_the_release() -> None:
    v = {"w": draw(50), "scalar": torch.tensor(3.0, dtype=torch.float64)}
    assert float(SVTPrivacy().update(an_update(v), a_context()).tensors["scalar"]) == 3.0


def test_with_the_noise_the_true_batch_is_an_exact_zero() -> None:
    view, x = observed(SVTPrivacy(gamma=1e-3), model="lenet", grants=SECRET)
    assert relative_error(replayed(view, x), view.update.tensors) < 1e-9


def test_it_declares_its_noise_only_while_it_is_on() -> None:
    assert SVTPrivacy().active_traits() == {Trait.DP_NOISE}
    assert SVTPrivacy(gamma=float("inf")).active_traits() == frozenset()
