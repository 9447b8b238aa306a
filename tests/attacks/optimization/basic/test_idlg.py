from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from leakatlas import models
from leakatlas.attacks.optimization.basic.idlg import IDLG
from leakatlas.bench import harness
from leakatlas.blocks import labels
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import replay
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage

CASE = Case({"steps": 2, "inner": 3}, {**LENET, "examples": 1})

Rule = Literal["paper", "bias", "sum"]
RULES: tuple[Rule, ...] = ("paper", "bias", "sum")
EXACT = IDLG(steps=30, line_search=True, tolerance=1e-12)


def recovered(rule: Rule, *, act: str, seed: int, sign: float = 1.0) -> bool:
    """Whether a rule finds the label of a random input on a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    model = models.build("fc", size=4, widths=(8,), classes=5, act=act, seed=seed)
    x = torch.rand(1, 3, 4, 4, generator=generator)
    y = torch.randint(5, (1,), generator=generator)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = replay.gradient(model, parameters, {}, x, y, create_graph=False)
    g = {name: sign * tensor.detach() for name, tensor in found.items()}
    return bool(labels.idlg(g, labels.find_head(model), rule=rule) == y)


@pytest.mark.parametrize("rule", ["paper", "bias"])
@pytest.mark.parametrize("act", ["relu", "tanh", "sigmoid"])
def test_two_rules_never_fail(rule: Rule, act: str) -> None:
    assert all(recovered(rule, act=act, seed=seed) for seed in range(40))


def test_the_sum_rule_needs_features_with_a_positive_sum() -> None:
    assert all(recovered("sum", act="sigmoid", seed=seed) for seed in range(40))
    right = sum(recovered("sum", act="tanh", seed=seed) for seed in range(40))
    assert 5 < right < 35


def test_only_the_paper_rule_survives_an_unknown_sign() -> None:
    assert all(recovered("paper", act="sigmoid", seed=seed, sign=-1) for seed in range(20))
    for rule in ("bias", "sum"):
        assert not any(recovered(rule, act="sigmoid", seed=seed, sign=-1) for seed in range(20))


@pytest.mark.parametrize("rule", RULES)
def test_a_positive_factor_changes_nothing(rule: Rule) -> None:
    for seed in range(20):
        assert recovered(rule, act="sigmoid", seed=seed, sign=1e3)
        assert recovered(rule, act="sigmoid", seed=seed, sign=1e-3)


def test_label_and_image_come_back() -> None:
    stage = build_stage(settings={"widths": (12,), "act": "sigmoid"}, examples=1, letter="A")
    trial = harness.run_trial(stage, EXACT)
    assert trial.found.labels is not None
    assert torch.equal(trial.found.labels, trial.truth.labels)
    assert float((trial.images - trial.truth.images).square().mean()) < 1e-6
    assert trial.found.reads == {"rounds", "num_examples", "input_shape", "classes"}


def test_a_wrong_label_keeps_the_distance_away_from_zero() -> None:
    """Ablation: the sum rule on tanh features picks a wrong class, and no image can fit it."""
    for seed in range(20):
        stage = build_stage(
            settings={"widths": (8,), "act": "tanh", "seed": seed}, examples=1, letter="A"
        )
        wrong = harness.run_trial(stage, replace(EXACT, rule="sum", steps=20))
        assert wrong.found.labels is not None
        if not torch.equal(wrong.found.labels, wrong.truth.labels):
            break
    else:
        pytest.fail("the sum rule was right on 20 tanh networks")
    right = harness.run_trial(stage, replace(EXACT, steps=20))
    assert wrong.found.notes["relative_distance"] > 1e-3
    assert right.found.notes["relative_distance"] < 1e-6


def test_a_batch_is_refused() -> None:
    found = harness.run_trial(build_stage(examples=2, letter="A"), IDLG()).found
    assert found.status == "failed"
    assert "one image" in found.reason


def test_two_classes_take_the_bias_rule() -> None:
    stage = build_stage(settings={"widths": (8,), "classes": 2}, examples=1, letter="A")
    with pytest.raises(UnsupportedModel, match="rule='bias'"):
        harness.run_trial(stage, IDLG())
    trial = harness.run_trial(stage, IDLG(rule="bias", steps=2))
    assert trial.found.labels is not None
    assert torch.equal(trial.found.labels, trial.truth.labels)


def test_a_saturated_network_makes_it_abstain() -> None:
    stage = build_stage(examples=1, letter="A")
    view, _ = harness.observe(stage, IDLG())
    seen = view.rounds[-1]
    assert seen.update is not None
    silent = seen.update.with_tensors({n: 0 * t for n, t in seen.update.tensors.items()})
    found = IDLG()(view.with_rounds([replace(seen, update=silent)], {}))
    assert found.status == "failed"
    assert "zero" in found.reason
    assert len(found.images) == 0


def test_more_restarts_never_fit_worse() -> None:
    attack = IDLG(steps=1, inner=4)
    view, _ = harness.observe(build_stage(examples=1, letter="A"), attack)
    one = attack(view, seed=2).notes["relative_distance"]
    four = replace(attack, restarts=4)(view, seed=2)
    assert four.notes["relative_distance"] <= one
    assert four.notes["restarts"] == 4
