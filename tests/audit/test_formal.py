"""(epsilon, delta) beside what was measured: right, and for every defense that declares it."""

from __future__ import annotations

from typing import Any

import pytest

from leakatlas.audit.formal import ACCOUNTANT, doubts, guarantees
from leakatlas.catalogue import registry
from leakatlas.defenses.formal.dp._accounting import gaussian_delta
from leakatlas.fl import FedAVG, FedSGD, Protocol, Trait

PLAIN: Protocol = FedSGD()


def of(key: str, protocol: Protocol = PLAIN, rounds: int = 1, **parameters: Any) -> dict[str, Any]:
    (found,) = guarantees(
        [registry.defense(key, **parameters)], protocol, rounds=rounds, delta=1e-5
    )
    return found


@pytest.mark.parametrize(
    ("key", "parameters", "unit"),
    [
        ("client_dp", {"unit": "update"}, "one client's whole contribution"),
        ("client_dp", {"unit": "example"}, "one example"),
        ("central_dp", {}, "one client"),
    ],
)
def test_epsilon_solves_the_privacy_curve(key: str, parameters: Any, unit: str) -> None:
    found = of(key, rounds=4, noise_multiplier=2.0, **parameters)
    # Four rounds of z = 2 are one Gaussian mechanism of z = 1.
    assert gaussian_delta(found["epsilon"], 1.0) == pytest.approx(1e-5)
    assert (found["unit"], found["accountant"], found["rounds"]) == (unit, ACCOUNTANT, 4)


def test_every_local_epoch_is_a_release_of_an_example() -> None:
    noisy: Any = {"unit": "example", "noise_multiplier": 2.0}
    two = of("client_dp", FedAVG(epochs=2), **noisy)
    assert two["epsilon"] > of("client_dp", FedAVG(epochs=1), **noisy)["epsilon"]
    assert two["epsilon"] == of("client_dp", FedAVG(epochs=1), rounds=2, **noisy)["epsilon"]


def test_defenses_without_privacy_budgets_claim_none() -> None:
    quiet = [registry.defense("clipping"), registry.defense("client_dp", noise_multiplier=0.0)]
    assert guarantees(quiet, PLAIN, rounds=1, delta=1e-5) == []


def test_every_defense_that_declares_differential_privacy_is_accounted_for() -> None:
    for key in registry.defense_keys():
        defense = registry.defense(key)
        if Trait.DP_NOISE in defense.active_traits():
            found = of(key)
            assert found["epsilon"] is not None or "no budget" in found["mind"], key


HEURISTIC = [key for key in registry.defense_keys()
             if ".heuristic." in registry.module_path("defense", key)]  # fmt: skip


@pytest.mark.parametrize("key", HEURISTIC)
def test_no_heuristic_row_shows_an_epsilon(key: str) -> None:
    """At no strength, whether or not it adds noise; and none can be asked for one."""
    plain = registry.defense(key)
    for value in plain.strengths:
        strong = registry.defense(key, **{plain.knob: value})
        assert Trait.DP_NOISE not in strong.active_traits()
        assert guarantees([strong], PLAIN, rounds=1, delta=1e-5) == []
    assert not callable(getattr(plain, "epsilon", None))  # Soteria's and DCS-2's are constants


def test_local_dp_is_worth_less_than_its_formula_says() -> None:
    found = of("local_dp_mod", rounds=3, epsilon=2.0)
    assert found["epsilon"] > 2.0
    for part in ("proven below 1", "may be 2 apart", "3 rounds"):
        assert part in found["mind"]
    proper: Any = {"epsilon": 0.5, "sensitivity": 2.0}
    assert of("local_dp_mod", **proper)["mind"] == ""


def test_what_a_framework_ships_is_doubted_where_it_gives_less() -> None:
    shipped = [registry.defense(k) for k in ("svt_privacy", "flower_clipping", "local_dp_mod")]
    said = doubts(shipped, rounds=1, entries=7_033_290)
    assert any("7.033e+04" in one for one in said)
    assert any("without any" in one for one in said)
    assert doubts([registry.defense("client_dp")], rounds=9) == []
    assert doubts([registry.defense("local_dp_mod", epsilon=float("inf"))], rounds=9) == []


def test_opacus_is_accounted_as_client_dp_on_examples() -> None:
    ours: Any = {"unit": "example", "noise_multiplier": 1.0}
    assert of("opacus_dpsgd", rounds=2)["epsilon"] == of("client_dp", rounds=2, **ours)["epsilon"]
