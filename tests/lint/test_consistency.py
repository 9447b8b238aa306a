"""D12 and D13: other clients, and what a client's own noise is worth."""

import math

import pytest
import torch
from opacus.accountants.analysis.gdp import eps_from_mu

from leakatlas import models
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import model_state, state_hash
from leakatlas.lint import RoundFacts
from leakatlas.lint.consistency import d12_consistency, d13_protocol, own_epsilon


def test_d12_compares_hashes_states_and_modules() -> None:
    model, other = models.build("lenet", width=2), models.build("lenet", width=2, seed=1)
    own = model_state(model)
    assert d12_consistency(own, [model, own, state_hash(own).upper()])[0].value == 0
    found = d12_consistency(own, [model, other, state_hash(model_state(other))])[0]
    assert found.value == 1
    assert "2 of 3 other clients" in found.words and "body.0.bias" in found.words
    assert d12_consistency(own, []) == []


def test_d12_names_the_tensors_that_differ() -> None:
    own = model_state(models.build("lenet", width=2))
    theirs = {**own, "body.0.weight": own["body.0.weight"] + 1e-3}
    words = d12_consistency(own, [theirs])[0].words
    assert "at body.0.weight" in words and "fc" not in words


def test_d12_refuses_what_is_no_hash() -> None:
    with pytest.raises(InvalidInput, match="64 hexadecimal digits"):
        d12_consistency({"w": torch.zeros(2)}, ["abc"])


@pytest.mark.parametrize(
    ("clip", "noise", "rounds"), [(1.0, 1.0, 1), (1.0, 4.0, 9), (0.5, 2.0, 50)]
)
def test_own_epsilon_is_that_of_gaussian_privacy(clip: float, noise: float, rounds: int) -> None:
    mu = math.sqrt(rounds) * clip / noise
    assert own_epsilon(clip, noise, rounds, 1e-5) == pytest.approx(
        eps_from_mu(mu=mu, delta=1e-5), rel=1e-4
    )


def test_own_epsilon_at_the_edges() -> None:
    assert own_epsilon(0.0, 1.0, 1, 1e-5) == math.inf  # no clipping, no bound
    assert own_epsilon(1.0, 0.0, 1, 1e-5) == math.inf
    assert own_epsilon(1e-6, 1.0, 1, 1e-5) == 0.0
    assert math.isfinite(own_epsilon(100.0, 1.0, 1, 1e-5))
    with pytest.raises(InvalidParameter, match="delta"):
        own_epsilon(1.0, 1.0, 1, 1.0)


def test_d13_does_not_count_the_noise_of_others() -> None:
    """Distributed noise for epsilon 1 among 100 clients is hardly any from each."""
    whole = RoundFacts(clip_norm=1.0, noise_std=4.0, epsilon=1.0)
    share = RoundFacts(clip_norm=1.0, noise_std=0.4, epsilon=1.0)
    assert d13_protocol(whole)[0].value == 0
    found = d13_protocol(share)[0]
    assert found.value == 1 and "own noise alone gives epsilon" in found.words


def test_d13_looks_at_the_cohort() -> None:
    facts = RoundFacts(cohort=("a", "b", "b"), least_cohort=3)
    assert (
        d13_protocol(facts)[0].value == 1 and "2 distinct members" in d13_protocol(facts)[0].words
    )
    fine = RoundFacts(cohort=("a", "b", "c"), attested=("a", "b", "c", "d"), least_cohort=3)
    assert d13_protocol(fine)[0].value == 0
    stranger = RoundFacts(cohort=("a", "b", "x"), attested=("a", "b"), least_cohort=3)
    assert "nobody vouches for x" in d13_protocol(stranger)[0].words
    assert d13_protocol(RoundFacts()) == []
