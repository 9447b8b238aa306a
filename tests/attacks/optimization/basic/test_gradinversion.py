from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import gradinversion
from leakatlas.attacks.optimization.basic.gradinversion import Consensus, GradInversion
from leakatlas.bench import harness
from leakatlas.blocks import batchnorm, descent, matching
from leakatlas.blocks.watch import Step, Watch
from leakatlas.errors import NotGranted, UnsupportedModel
from leakatlas.fl import FedSGD, Stage
from leakatlas.threat import Grant
from tests.attacks.case import Case
from tests.conftest import build_stage

CASE = Case({"steps": 3, "seeds": 2}, {"model": "convnet-bn", "settings": {}})

BN = frozenset({Grant.BATCH_BN})
SHORT = GradInversion(steps=3, seeds=2)


def small(**changes: object) -> Stage:
    settings = {"model": "convnet-bn", "settings": {"width": 4}, "examples": 2, "letter": "E",
                "grants": BN}  # fmt: skip
    return build_stage(**{**settings, **changes})  # type: ignore[arg-type]  # a dict of settings


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_term_but_the_image_priors_vanishes_at_the_truth(
    mode: Literal["train", "eval"],
) -> None:
    stage = small(protocol=FedSGD(mode=mode))
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    replayed = view.replay(client.x, client.y)
    assert float(matching.layerwise_l2(replayed, view.update.tensors).detach()) < 1e-6
    prior = batchnorm.prior(view.model, view.batch_bn)
    assert float(prior(client.x)) < 1e-5
    assert float(prior(client.x + 0.1)) > 1e-2


def test_identical_searches_feel_no_pull() -> None:
    x = noise(1, 2, 3, 8, 8).expand(3, -1, -1, -1, -1)
    lazy = Consensus(replace(SHORT, consensus="lazy"))(x, Step(0, 0.0))
    registered = gradinversion.registered_mean(x)
    torch.testing.assert_close(lazy, x[0])
    torch.testing.assert_close(registered, x[0])
    assert all(float(matching.norm(x_g - lazy)) < 1e-6 for x_g in x)


def test_pulls_towards_a_mean_that_moves_along_cancel() -> None:
    """With squared norms, whose slopes do not depend on the distance."""
    x = noise(3, 1, 1, 4, 4).requires_grad_()
    (slope,) = torch.autograd.grad((x - x.mean(0)).square().sum(), x)
    assert float(slope.sum(0).abs().max()) < 1e-12


def test_the_shift_between_two_images_is_found_and_undone() -> None:
    reference = noise(3, 3, 8, 10)
    shifts = torch.tensor([[0, 0], [3, 1], [6, 9]])
    moved = torch.stack(
        [
            torch.roll(image, (-int(down), -int(right)), dims=(1, 2))
            for image, (down, right) in zip(reference, shifts, strict=True)
        ]
    )
    found = gradinversion.shift_to(moved, reference)
    assert torch.equal(found, shifts)
    torch.testing.assert_close(gradinversion.shifted(moved, found), reference)


def test_registration_undoes_what_averaging_blurs() -> None:
    image = noise(1, 3, 8, 8)
    searches = torch.stack([image, image, torch.roll(image, (2, 3), dims=(2, 3))])
    blurred = searches.mean(0)
    registered = gradinversion.registered_mean(searches)
    aligned = min(
        float((torch.roll(registered, (i, j), dims=(2, 3)) - image).abs().max())
        for i in range(8)
        for j in range(8)
    )
    assert aligned < 1e-10
    assert float((blurred - image).abs().max()) > 0.1


def test_a_blank_image_has_no_shift() -> None:
    blank = torch.zeros(1, 1, 4, 4)
    assert gradinversion.shift_to(blank, noise(1, 1, 4, 4).float()).tolist() == [[0, 0]]


def test_the_consensus_is_refreshed_on_time() -> None:
    settings = replace(SHORT, consensus="registered", register_from=0.5, refresh=10)
    agreed = Consensus(settings)
    first, second = noise(2, 1, 1, 8, 8, seed=1), noise(2, 1, 1, 8, 8, seed=2)
    torch.testing.assert_close(agreed(first, Step(0, 0.0)), first.mean(0))
    at_refresh = agreed(first, Step(50, 0.5))
    assert torch.equal(agreed(second, Step(51, 0.51)), at_refresh)
    assert not torch.equal(agreed(second, Step(60, 0.6)), at_refresh)


def test_noise_enters_the_pixels_after_the_step() -> None:
    """With a flat objective all that moves a pixel is noise of deviation lr * alpha_n."""

    def flat(variables: descent.Variables, t: Tensor) -> Tensor:
        del t
        return 0.0 * variables["x"].sum()

    generator = torch.Generator().manual_seed(0)
    end = descent.descend(
        flat, {"x": torch.zeros(1, 4, 3, 64, 64)}, optimizer=descent.adam(0.1), steps=1,
        watch=Watch(), after=(descent.langevin(0.2, "x", generator=generator),),
    )  # fmt: skip
    assert float(end.last["x"].std()) == pytest.approx(0.1 * 0.2, rel=0.02)


def test_distinct_labels_are_read_off_the_head() -> None:
    for seed in range(5):
        stage = small(settings={"width": 4, "seed": seed}, examples=3)
        trial = harness.run_trial(stage, replace(SHORT, steps=1, seeds=1))
        assert trial.found.labels is not None
        assert sorted(trial.found.labels.tolist()) == sorted(trial.truth.labels.tolist())
        assert trial.found.notes["labels_granted"] == 0


def test_granted_labels_are_taken() -> None:
    trial = harness.run_trial(small(grants=BN | {Grant.LABELS}), SHORT)
    assert trial.found.labels is not None
    assert torch.equal(trial.found.labels, trial.truth.labels)


def test_more_examples_than_classes_cannot_be_distinct() -> None:
    stage = small(settings={"width": 4, "classes": 2}, examples=2)
    view, _ = harness.observe(stage, SHORT)
    crowded = view._copy({**view._fields, "num_examples": 3})
    found = SHORT(crowded)
    assert found.status == "failed"
    assert "distinct" in found.reason


def test_the_exact_statistics_are_a_grant_and_the_running_ones_are_not() -> None:
    bare = small(grants=frozenset(), letter="A")
    with pytest.raises(NotGranted, match="batch_bn"):
        harness.run_trial(bare, SHORT)
    running = harness.run_trial(bare, replace(SHORT, bn="running"))
    assert running.found.reads == {"rounds", "num_examples", "input_shape", "classes"}
    assert replace(SHORT, bn_weight=0).grants() == frozenset()
    exact = harness.run_trial(small(), SHORT)
    assert "batch_bn" in exact.found.reads


def test_a_model_without_bn_needs_the_term_left_out() -> None:
    plain = small(model="convnet", grants=frozenset())
    with pytest.raises(UnsupportedModel, match="no BN layer"):
        harness.run_trial(plain, replace(SHORT, bn="running"))
    found = harness.run_trial(plain, replace(SHORT, bn_weight=0)).found
    assert found.status == "complete"


def test_the_model_is_as_it_was() -> None:
    stage = small(protocol=FedSGD(mode="train"))
    view, _ = harness.observe(stage, SHORT)
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    SHORT(view)
    assert all(torch.equal(before[n], t) for n, t in view.model.state_dict().items())


def test_the_bn_term_moves_the_statistics_of_the_candidates() -> None:
    """Ablation: without it the candidates' statistics are further from the private batch's."""
    attack = GradInversion(steps=60, seeds=1, noise=0.0, warmup=5)
    stage = small(examples=2)
    view, _ = harness.observe(stage, attack)
    prior = batchnorm.prior(view.model, view.batch_bn)
    start = replace(attack, steps=1)(view)
    found = attack(view)
    without = replace(attack, bn_weight=0)(view)
    assert found.notes["objective"] < start.notes["objective"]
    assert float(prior(found.images)) < 0.5 * float(prior(without.images))
    assert float(prior(found.images)) < 0.5 * float(prior(start.images))


def test_the_answer_may_be_the_consensus() -> None:
    best = harness.run_trial(small(), SHORT).found
    mean = harness.run_trial(small(), replace(SHORT, answer="consensus", consensus="lazy")).found
    assert best.images.shape == mean.images.shape == (2, 3, 8, 8)
    assert float(mean.images.std()) < float(best.images.std())


def test_searches_draw_together_with_the_group_term() -> None:
    attack = GradInversion(steps=40, seeds=3, noise=0.0, warmup=5, group_weight=1.0)
    stage = small(examples=1)
    together = harness.run_trial(stage, attack).found.notes["spread_of_searches"]
    apart = harness.run_trial(stage, replace(attack, group_weight=0))
    assert together < 0.8 * apart.found.notes["spread_of_searches"]
