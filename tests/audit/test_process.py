"""An audit attacks from a process of its own, and gives what it gives in this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leakatlas.audit import Plan, carry_out


@pytest.mark.own_process
def test_both_ways_find_the_same_and_the_recipe_says_which(small_plan: Plan) -> None:
    plan = replace(small_plan, seconds=None)  # by steps, so that both ways end alike
    own = carry_out(plan)
    here = carry_out(replace(plan, in_process=True))
    assert [run.status for run in own.runs].count("complete") >= 2
    for a, b in zip(own.runs, here.runs, strict=True):
        assert (a.attack, a.status, a.reason, a.scores, a.reads, a.notes) == (
            b.attack, b.status, b.reason, b.scores, b.reads, b.notes,
        )  # fmt: skip
        if a.recipe:
            assert a.recipe["conditions"]["process"] == "own"
            assert b.recipe["conditions"]["process"] == "shared"
