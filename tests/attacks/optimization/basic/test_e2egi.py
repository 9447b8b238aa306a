from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import e2egi
from leakatlas.attacks.optimization.basic.e2egi import E2EGI
from leakatlas.bench import harness
from leakatlas.blocks import batchnorm, chunks, descent, labels, matching
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG, FedSGD, Stage
from leakatlas.threat import Grant
from tests.attacks.case import Case
from tests.conftest import build_stage

CASE = Case({"steps": 6, "groups": 2, "inner": 2}, {"model": "convnet-bn", "settings": {}},
            boxed=True)  # fmt: skip

BN = frozenset({Grant.BATCH_BN})
SHORT = E2EGI(steps=6, groups=2, inner=2)


def small(**changes: Any) -> Stage:
    settings = {"model": "convnet-bn", "settings": {"width": 4}, "examples": 2, "letter": "E",
                "grants": BN, **changes}  # fmt: skip
    return build_stage(**settings)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# -- labels ----------------------------------------------------------------------------------------


def test_counts_are_exact_wherever_a_class_is_absent() -> None:
    """Uniform output and equal feature sums: row c is (B/K - n_c) s / B, spread over features."""
    classes, batch, s = 4, 6, 3.0
    share = torch.rand(5, generator=torch.Generator().manual_seed(0)).double()
    share /= share.sum()
    tried = 0
    for counts in itertools.product(range(batch + 1), repeat=classes):
        if sum(counts) != batch or 0 not in counts:
            continue
        rows = (batch / classes - torch.tensor(counts).double()) * s / batch
        found = labels.e2egi(rows[:, None] * share, batch)
        assert found.tolist() == list(counts)
        tried += 1
    assert tried == 74


def test_a_batch_of_every_class_equally_often_has_no_scale_and_falls_back() -> None:
    weight = torch.zeros(3, 5).double()
    assert torch.equal(labels.e2egi(weight, 6), labels.llg(weight, 6))
    assert int(labels.e2egi(weight, 6).sum()) == 6


def test_labels_are_read_granted_or_taken_as_given() -> None:
    stage = small(examples=3)
    trial = harness.run_trial(stage, SHORT)
    assert trial.found.labels is not None
    assert sorted(trial.found.labels.tolist()) == sorted(trial.truth.labels.tolist())
    granted = harness.run_trial(small(grants=BN | {Grant.LABELS}), SHORT)
    assert granted.found.notes["labels_granted"] == 1
    given = harness.run_trial(small(), replace(SHORT, labels=(4, 4)))
    assert given.found.labels is not None and given.found.labels.tolist() == [4, 4]


# -- recombination ---------------------------------------------------------------------------------


def test_the_loss_never_rises_along_the_greedy_choice() -> None:
    groups, target = noise(3, 4, 1, 2, 2), noise(4, 1, 2, 2, seed=1)
    kept: list[float] = []

    def loss(x: Tensor) -> float:
        value = float((x - target).square().sum())
        kept.append(min([value, *kept]))
        return value

    best = int((groups - target).square().sum((1, 2, 3, 4)).argmin())
    chosen = e2egi.consensus(groups, best, loss)
    assert kept == sorted(kept, reverse=True)
    assert float((chosen - target).square().sum()) == kept[-1] <= kept[0]
    # images do not interact in this loss, so the greedy choice is the best of all combinations
    least = (groups - target).square().sum((2, 3, 4)).amin(0).sum()
    assert kept[-1] == pytest.approx(float(least))


def test_of_one_image_it_is_the_best_of_all() -> None:
    groups = noise(5, 1, 1, 2, 2)

    def loss(x: Tensor) -> float:
        return float((x - 0.3).square().sum())

    chosen = e2egi.consensus(groups, 0, loss)
    assert loss(chosen) == min(loss(group) for group in groups)


def test_equal_groups_stay_as_they_are() -> None:
    group = noise(3, 1, 2, 2)
    chosen = e2egi.consensus(group.expand(4, -1, -1, -1, -1), 2, lambda x: float(x.sum()))
    assert torch.equal(chosen, group)


def test_groups_in_exchanged_places_are_put_in_order_inside_a_class() -> None:
    """Without it the greedy choice takes one image twice."""
    images = noise(3, 1, 2, 2)
    y = torch.tensor([7, 7, 2])
    groups = torch.stack([images, images[[1, 0, 2]] + 0.01])
    aligned = e2egi.align(groups, 0, y)
    torch.testing.assert_close(aligned[1], images + 0.01)
    assert torch.equal(aligned[0], images)
    apart = e2egi.align(groups, 0, torch.tensor([7, 1, 2]))
    assert torch.equal(apart, groups)


def test_the_consensus_never_exceeds_the_best_group() -> None:
    """On a real gradient, whose images do interact."""
    stage = small(examples=3, grants=BN | {Grant.LABELS})
    view, _ = harness.observe(stage, SHORT)
    groups = noise(3, 3, 3, 8, 8)
    y = view.labels

    def distance(x: Tensor) -> float:
        return float(matching.cosine(view.replay(x, y), dict(view.update.tensors)).detach())

    losses = [distance(group) for group in groups]
    best = losses.index(min(losses))
    assert distance(e2egi.consensus(groups, best, distance)) < min(losses)


# -- stages ----------------------------------------------------------------------------------------


def test_stages_are_those_of_the_released_command_line() -> None:
    lengths = e2egi.stage_lengths(24_000, 1_000)
    assert lengths == [7_200, *[1_000] * 8, 9_600]
    rates = e2egi.stage_rates(lengths, 0.1046, 1e-3)
    assert rates[0][0] == 0.1046 and rates[-1][1] == pytest.approx(1e-3)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(rates))
    assert rates[0][1] == pytest.approx(0.1046 - (0.1046 - 1e-3) * 7_200 / 24_800)
    assert e2egi.stage_lengths(1, 1_000) == [1, 1, 1]


def test_the_step_size_follows_the_released_scheduler() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=30, T_mult=1, eta_min=0.02
    )
    ours = e2egi.falling(0.02 / 0.1, 20)
    for step in range(20):
        assert 0.1 * ours(step / 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_statistics_vanish_at_the_truth_if_they_are_the_batchs(
    mode: Literal["train", "eval"],
) -> None:
    stage = small(protocol=FedSGD(mode=mode))
    view, _ = harness.observe(stage, SHORT)
    x = stage.federation.clients[0].x
    assert float(SHORT.bn_prior(view)(x)) < 1e-5
    running = replace(SHORT, bn="running")
    assert running.grants() == frozenset()
    assert float(running.bn_prior(view)(x)) > 1e-2
    assert float(replace(SHORT, bn_weight=0.0).bn_prior(view)(x)) == 0
    assert batchnorm.running_statistics(view.model).keys() == view.batch_bn.keys()


def test_the_heavier_the_pull_the_closer_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spread of minimisers of the second stage never rises with the weight.

    Minimisers: the descent of the attack follows signs and does not settle on them, see below.
    """
    stage = small(examples=1, grants=frozenset({Grant.LABELS}))
    descend = descent.descend

    def spread(weight: float) -> float:
        stages: list[tuple[Any, dict[str, Tensor]]] = []

        def spy(objective: Any, start: dict[str, Tensor], **rest: Any) -> Any:
            stages.append((objective, start))
            return descend(objective, start, **rest)

        attack = E2EGI(
            steps=12, groups=2, inner=4, noise=0.0, tv_weight=0.0, bn_weight=0.0,
            group_weight=weight,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(descent, "descend", spy)
            harness.run_trial(stage, attack)
        objective, start = stages[1]
        settled = descend(
            objective, start, candidates=2, optimizer=descent.lbfgs(), steps=2, watch=Watch()
        )
        x = settled.last["x"]
        return float((x - x.mean(0)).square().mean().sqrt())

    spreads = [spread(weight) for weight in (0.0, 1e-3, 1e-2, 0.1, 1.0)]
    assert all(lighter > heavier for lighter, heavier in itertools.pairwise(spreads))
    assert spreads[-1] < 0.01 * spreads[0]


def test_signed_steps_draw_the_groups_together_but_only_so_far() -> None:
    """A step is as long at any weight; the pull alone decides all signs from some weight on."""
    stage = small(examples=1, grants=BN | {Grant.LABELS})
    spreads = [
        harness.run_trial(
            stage, E2EGI(steps=60, groups=3, inner=6, noise=0.0, group_weight=weight)
        ).found.notes["spread_of_groups"]
        for weight in (0.0, 100.0, 1e4)
    ]
    assert max(spreads[1:]) < 0.9 * spreads[0]
    assert spreads[2] == pytest.approx(spreads[1], rel=1e-2)


def test_the_final_stage_starts_from_the_newest_consensus(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []
    built: list[Tensor] = []
    original, descend = e2egi.consensus, descent.descend

    def spy(objective: Any, start: dict[str, Tensor], **rest: Any) -> Any:
        starts.append(start["x"])
        return descend(objective, start, **rest)

    def note(*arguments: Any) -> Tensor:
        built.append(original(*arguments))
        return built[-1]

    monkeypatch.setattr(descent, "descend", spy)
    monkeypatch.setattr(e2egi, "consensus", note)
    harness.run_trial(small(), SHORT)
    assert len(starts) == 3 and len(built) == 2
    assert torch.equal(starts[-1], built[-1]) and not torch.equal(starts[-1], built[0])


# -- large batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gradient_in_pieces_equals_the_whole(
    reduction: Literal["mean", "sum"], size: int
) -> None:
    stage = small(
        examples=3, protocol=FedSGD(reduction=reduction), grants=frozenset({Grant.LABELS})
    )
    view, _ = harness.observe(stage, replace(SHORT, bn="running"))
    x = noise(*view.batch_shape).requires_grad_()
    g, y = dict(view.update.tensors), view.labels
    pieces = chunks.in_chunks(view.replayer(), size, view)
    values, slopes = [], []
    for replay in (view.replayer(), pieces):
        value = matching.squared_l2(replay(x, y), g)
        values.append(float(value.detach()))
        slopes.append(torch.autograd.grad(value, x)[0])
    assert values[1] == pytest.approx(values[0], rel=1e-12)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-6, atol=1e-12)
    whole = harness.run_trial(stage, replace(SHORT, bn="running", steps=3)).found
    parts = harness.run_trial(stage, replace(SHORT, bn="running", steps=3, chunk=size)).found
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-6, atol=1e-6)


def test_pieces_need_examples_that_do_not_meet() -> None:
    chunked = replace(SHORT, chunk=1)
    with pytest.raises(InvalidInput, match="mixes examples"):
        harness.run_trial(small(protocol=FedSGD(mode="train")), chunked)
    steps = FedAVG(epochs=2, batch_size=2, mode="eval")
    with pytest.raises(InvalidInput, match="took local steps"):
        harness.run_trial(small(protocol=steps), chunked)


def test_what_cannot_work_is_said_before() -> None:
    view, _ = harness.observe(small(model="convnet"), SHORT)
    assert SHORT.outlook(view).verdict == "hopeless"
    assert E2EGI.tuned().outlook(view).verdict == "unknown"
    assert math.isfinite(harness.run_trial(small(), SHORT).found.notes["matching_loss"])
