"""The two verdicts: which runs make them, and what is said where one was not run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from leakatlas.metrics.score import score
from leakatlas.report import Realism, Run, verdict
from leakatlas.report.realism import COINCIDE, EXACT, OUT_OF_REACH, standings


def a_run(setting: str, letter: str, error: float, attack: str = "dlg") -> Run:
    """A run whose candidate is off by ``error`` everywhere."""
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    public = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    scores = score((x + error).clamp(0, 1), x, public=public)
    return Run(
        setting=setting,
        attack=attack,
        letter=letter,
        vantage="server",
        target=0,
        defenses=(),
        status="complete",
        reason="",
        verdict=verdict(scores),
        scores=scores,
    )


WEAK, STRONG, EXACTLY = a_run("s", "B", 0.5), a_run("upper bound: s", "B", 0.05), 0.0
APART = Realism("s", {}, separates=("labels are granted",))


def test_the_upper_bound_counts_every_run_and_names_what_separates() -> None:
    (found,) = standings([WEAK], [replace(APART, runs=(STRONG,))], ["B"])
    assert (found.deployed, found.bound) == ("not demonstrated", "recognisable")
    assert found.deployed_run is WEAK and found.bound_run is STRONG
    assert found.between == "labels are granted"


def test_an_upper_bound_that_came_out_lower_is_the_deployed_run() -> None:
    strong, weak = replace(STRONG, setting="s"), replace(WEAK, setting="upper bound: s")
    (found,) = standings([strong], [replace(APART, runs=(weak,))], ["B"])
    assert found.bound_run is strong and found.bound == "recognisable"
    assert found.between.startswith("with all that was granted, no attack reached")


def test_a_shorter_upper_bound_says_so() -> None:
    long, short = replace(WEAK, seconds=20.0), replace(WEAK, setting="upper bound: s", seconds=4)
    (found,) = standings([long], [replace(APART, runs=(short,))], ["B"])
    assert "it had 4 s, as deployed 20 s" in found.between


def test_where_nothing_separates_the_two_coincide() -> None:
    (found,) = standings([WEAK], [replace(APART, separates=())], ["B"])
    assert found.bound == found.deployed and found.between == COINCIDE


def test_what_was_not_run_is_not_tested() -> None:
    (found,) = standings([WEAK], [replace(APART, reason="the budget ended")], ["B"])
    assert found.bound == "not tested" and found.bound_run is None
    assert found.between == "not run: the budget ended"


def test_an_exact_leak_needs_no_upper_bound() -> None:
    (found,) = standings([a_run("s", "B", EXACTLY)], [replace(APART, reason="full")], ["B"])
    assert found.deployed == found.bound == "exact leak" and found.between == EXACT


def test_runs_beyond_a_letters_knowledge_do_not_count_for_it() -> None:
    weak, strong = replace(WEAK, letter="A"), replace(STRONG, letter="D")
    first, second = standings([weak], [replace(APART, runs=(strong,))], ["A", "D"])
    assert first.bound == "not tested" and OUT_OF_REACH in first.between
    assert second.bound == "recognisable"


def test_a_setting_with_oracles_is_the_upper_bound_itself() -> None:
    granted = replace(APART, configured="diagnostic upper bound")
    (without,) = standings([replace(STRONG, setting="s")], [replace(granted, reason="no")], ["B"])
    assert (without.deployed, without.bound) == ("not tested", "recognisable")
    assert "as deployed not run: no" in without.between
    runs = (replace(WEAK, setting="as deployed: s"),)
    (both,) = standings([replace(STRONG, setting="s")], [replace(granted, runs=runs)], ["B"])
    assert (both.deployed, both.bound) == ("not demonstrated", "recognisable")


@pytest.mark.parametrize("letters", [["A"], ["A", "H"]])
def test_without_runs_nothing_is_tested(letters: list[str]) -> None:
    found = standings([], [replace(APART, reason="the audit has not come to it")], letters)
    assert {s.deployed for s in found} == {s.bound for s in found} == {"not tested"}
