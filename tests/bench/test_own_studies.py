"""What studies with a Python file of their own compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from leakatlas.bench import correlations
from leakatlas.bench import study as studies
from leakatlas.bench.record import Record
from leakatlas.bench.schema import OwnMeasure
from leakatlas.blocks.labels import METHODS
from leakatlas.catalogue.results import default_folder


def test_every_label_rule_is_studied_beside_the_null() -> None:
    study = studies.load("labels")
    for case in study.cases.values():
        names = {m.name for m in case.measures if isinstance(m, OwnMeasure)}
        assert {"even-spread", "refusals"} <= names
    named = {
        m.name for case in study.cases.values() for m in case.measures if isinstance(m, OwnMeasure)
    }
    # R-GAP's rule belongs to its attack: it needs a network with one output.
    assert named - {"even-spread", "refusals"} == METHODS.keys() - {"rgap"}


def test_the_weight_is_chosen_on_images_that_no_network_has_seen() -> None:
    starts = {c.victims.first for c in studies.load("measures_tuning").cases.values()}
    assert starts == {45_000 + 2 * network for network in range(6)}
    sets = {c.victims.set for c in studies.load("measures").cases.values()}
    assert sets == {"parquet:cifar10/test.parquet"}


def test_step_sizes_on_photographs_are_those_that_were_chosen_on_another_seed() -> None:
    tuning = studies.load("utility_tuning")
    text = (default_folder() / "utility_tuning.json").read_text(encoding="utf-8")
    chosen = {
        case["case"]: measure["value"]
        for case in json.loads(text)["cases"]
        for measure in case["measures"]
        if measure["name"] == "lr"
    }
    assert chosen.keys() == tuning.cases.keys()
    cases = studies.load("utility_standard").cases
    assert {label.partition("/")[2] for label in cases} == chosen.keys()
    for label, case in cases.items():
        tuned = tuning.cases[label.partition("/")[2]]
        assert case.utility is not None and tuned.utility is not None
        assert case.utility.rates == (chosen[label.partition("/")[2]],)
        assert (case.model, case.protocol, case.defenses) == (
            tuned.model, tuned.protocol, tuned.defenses,
        )  # fmt: skip
        assert case.utility.train == tuned.utility.train
        assert not set(case.seeds) & set(tuned.seeds)
    normed = studies.load("utility_batch_norm").cases
    for label in ("none", "FedKL, 0.5"):
        case, other = normed[f"photographs/{label}"], cases[f"unlike/{label}"]
        assert other.utility is not None and case.model.kwargs["norm"] == "batch"
        assert case.utility == other.utility.model_copy(update={"course": None})
        assert (case.protocol, case.defenses) == (other.protocol, other.defenses)


@pytest.mark.parametrize("clients", ["unlike", "alike"])
def test_the_goal_is_nine_tenths_of_what_the_undefended_reach(clients: str) -> None:
    text = (default_folder() / "utility_standard.json").read_text(encoding="utf-8")
    (plain,) = (case for case in json.loads(text)["cases"] if case["case"] == f"{clients}/none")
    (reached,) = (m["value"] for m in plain["measures"] if m["name"] == "accuracy")
    cases = studies.load("utility_standard").cases
    trainings = [c.utility for name, c in cases.items() if name.startswith(clients)]
    (goal,) = {u.course.goal for u in trainings if u is not None and u.course is not None}
    assert goal == pytest.approx(0.9 * reached, abs=5e-4)


def test_both_attacks_and_all_protocols_meet_the_same_batches() -> None:
    cases = studies.load("measures").cases
    for label, case in cases.items():
        twin = cases[label.replace("cosine", "l2")]
        assert (case.victims, case.seeds, case.batches) == (twin.victims, twin.seeds, twin.batches)
        if "FedAVG" in label:
            alone = cases[label.replace("FedAVG 1x4, ", "").replace("FedAVG 2x1, ", "")]
            assert (case.victims, case.batch) == (alone.victims, alone.batch)


def _records(values: Sequence[float], psnr: Sequence[float]) -> list[Record]:
    return [
        Record(
            cell=f"{number}", code="", study="measures", label="", seed=number, batch=number,
            recipe={}, status="complete", own={"bayes_psnr": [v], "rank_index": [v]},
            scores={"images": [{"psnr": q}]},
        )
        for number, (v, q) in enumerate(zip(values, psnr, strict=True))
    ]  # fmt: skip


def test_a_correlation_is_oriented_and_within_is_not_between() -> None:
    study = studies.load("measures")
    n = 60
    # Two set-ups: the one with larger values is 100 dB worse; inside, larger is better.
    records = {
        f"net/{setup}/{attack}": _records(
            [shift + i for i in range(n)], [(sign * shift) + i / 10 for i in range(n)]
        )
        for setup, shift in (("a", 0), ("b", 100))
        for attack, sign in (("l2", -1), ("cosine", 1))
    }
    found: dict[str, dict[str, Any]] = {f["name"]: f for f in correlations.figures(study, records)}
    assert found["spearman pooled/cosine/bayes_psnr"]["value"] == pytest.approx(1)
    assert found["spearman pooled/cosine/rank_index"]["value"] == pytest.approx(-1)
    assert found["spearman pooled/l2/bayes_psnr"]["value"] < 0
    assert found["spearman within/l2/bayes_psnr"]["value"] == pytest.approx(1)
    assert found["spearman within/l2/bayes_psnr"]["n"] == 2 * n
    # Nothing took several local steps, and no batch had several images.
    assert not [name for name in found if "fedavg" in name or "image" in name]


@pytest.mark.parametrize("grid", ["frontier", "frontier_full", "frontier_cifar"])
def test_every_defense_of_the_frontier_meets_every_letters_own_adversary(grid: str) -> None:
    letters: dict[str, set[str]] = {}
    for label, case in studies.load(grid).cases.items():
        if case.attack is not None:
            letters.setdefault(label.partition("/")[0], set()).add(case.letter)
    assert len(letters) > 50
    for name, own in letters.items():
        # Nobody is ignorant of no defense.
        assert set("ABCDEFGH") - own <= ({"B"} if name == "none" else set()), name
