"""Which attacks meet a defense, and what becomes of defenses that cannot take part."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leakatlas.audit import Plan, carry_out
from leakatlas.audit.compare import _battery
from leakatlas.audit.utility import Utility
from leakatlas.catalogue import registry
from leakatlas.errors import IncompatibleDefenses


def test_sets_that_cannot_stand_together_are_refused_before_anything_runs(small_plan: Plan) -> None:
    both = (
        registry.defense("secure_aggregation"),
        registry.defense("central_dp", noise_multiplier=1.0),
    )
    with pytest.raises(IncompatibleDefenses, match=r"alternatives, 'both': central_dp must read"):
        replace(small_plan, alternatives={"both": both})


def test_a_set_that_does_not_fit_the_model_says_so_and_the_others_go_on(
    small_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakatlas.audit.compare.price_of", lambda *_, **__: Utility(0.9))
    sets = {
        "locked": (registry.defense("fedkl"),),  # needs a normalisation layer
        "clipping": (registry.defense("clipping", max_norm=0.01),),
    }
    report = carry_out(replace(small_plan, alternatives=sets))
    locked, clipped = report.comparisons[1:]
    assert {run.status for run in locked.runs} == {"refused"}
    assert all("FedKL locks the scale and shift" in run.reason for run in locked.runs)
    assert any(run.scores is not None for run in clipped.runs)
    assert any("locked" in reason for reason in report.undecided())


def test_every_kind_of_attack_meets_a_defense(small_plan: Plan) -> None:
    """What ends a closed form may leave a search as it was."""
    setting = replace(
        small_plan.settings[0], attacks=("rgap", "inverting_gradients", "robbing_the_fed")
    )
    report = carry_out(replace(small_plan, settings=(setting,)))
    keys = [key for key, _ in _battery(report.runs)]
    assert keys == ["rgap", "robbing_the_fed", "inverting_gradients"]
