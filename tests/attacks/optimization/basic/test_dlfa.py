from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import dlfa
from leakatlas.attacks.optimization.basic.dlfa import DLFA
from leakatlas.bench import harness
from leakatlas.blocks import epochs, labels, priors
from leakatlas.blocks.observed import mean_gradient
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedAVG, FedSGD, Stage, View, task_loss
from leakatlas.threat import Grant
from tests.attacks.case import Case
from tests.conftest import BOX, build_stage, gradients_at, relative_error

TWO_EPOCHS = FedAVG(epochs=2, batch_size=2, lr=0.05, shuffle=True)
SCENE = {"model": "lenet", "settings": {"width": 4}, "protocol": TWO_EPOCHS, "examples": 3}
CASE = Case({"steps": 3, "dummies": 8}, SCENE, boxed=True)
SHORT = DLFA(steps=3, dummies=8)
LABELS = frozenset({Grant.LABELS})


def stage_of(**changes: Any) -> Stage:
    return build_stage(**{**SCENE, "letter": "C", **changes})


def seen(**changes: Any) -> tuple[View, Tensor, Tensor, Sequence[Tensor]]:
    """View, private images and labels, and the indices of every local step."""
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    client = stage.federation.clients[0]
    granted, _ = harness.observe(stage_of(**{**changes, "grants": {Grant.BATCH_ORDER}}), SHORT)
    return view, client.x, client.y, granted.batch_order


def epochs_in_order(x: Tensor, order: Sequence[Tensor], N: int) -> Tensor:
    """The private set as each epoch saw it, one after the other."""
    flat = torch.cat(list(order))
    return torch.cat([x[part] for part in flat.split(N)])


# -- the simulation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "B"), [(4, 2), (3, 2), (5, 3), (3, 8)])
def test_the_simulation_is_a_loop_of_sgd_also_where_batches_do_not_divide(N: int, B: int) -> None:
    protocol = FedAVG(epochs=2, batch_size=B, lr=0.1)
    view, _, _, _ = seen(protocol=protocol, examples=N)
    x = torch.randn(2 * N, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(2 * N) % 10
    model = view.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for epoch in range(2):
        for start in range(0, N, B):
            places = torch.arange(start, min(start + B, N)) + epoch * N
            g = gradients_at(model, x[places], y[places], task_loss)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.sub_(0.1 * g[name])
    expected = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    assert relative_error(SHORT.simulate(view, 2)(x, y), expected) < 1e-12


def test_an_epoch_never_reads_into_the_next() -> None:
    batches = epochs.epoch_batches(3, 2, 2, 2)
    assert [b.tolist() for b in batches] == [[0, 1], [2], [3, 4], [5]]
    shared = epochs.epoch_batches(3, 2, 2, 1)
    assert [b.tolist() for b in shared] == [[0, 1], [2], [0, 1], [2]]


def test_the_loss_is_zero_in_the_true_order_and_not_in_another() -> None:
    """Two epochs of batches smaller than the set: the unknown that the prior addresses."""
    view, x, y, order = seen(examples=4)
    to_match, run = SHORT.matching_term(view, 2), SHORT.simulate(view, 2)
    true, targets = epochs_in_order(x, order, 4), epochs_in_order(y, order, 4)
    assert float(to_match(run(true, targets)).detach()) < 1e-20
    other = torch.tensor([1, 2, 3, 0, 4, 5, 6, 7])
    assert float(to_match(run(true[other], targets[other])).detach()) > 1e-8


def test_simplified_simulations_are_larger_steps() -> None:
    view, x, y, _ = seen(protocol=FedAVG(epochs=2, batch_size=2, lr=0.1), examples=4)
    model = view.model
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    g = gradients_at(model, x, y, task_loss)
    single = replace(SHORT, simulation="single").simulate(view, 1)(x, y)
    assert relative_error(single, {n: -0.1 * 4 * t for n, t in g.items()}) < 1e-12
    for _ in range(2):
        g = gradients_at(model, x, y, task_loss)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(0.1 * 2 * g[name])
    expected = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    epoch = replace(SHORT, simulation="epoch").simulate(view, 2)(x.repeat(2, 1, 1, 1), y.repeat(2))
    assert relative_error(epoch, expected) < 1e-12


def test_the_matching_term_equals_the_formula() -> None:
    """In NumPy, on the pseudo-gradients, by layer from the input."""
    view, x, y, _ = seen(examples=3)
    mine = SHORT.simulate(view, 2)(x.repeat(2, 1, 1, 1) + 0.1, y.repeat(2))
    names = list(dict(view.model.named_parameters()))
    depth = {n: i // 2 for i, n in enumerate(names)}
    total = 0.0
    for n in names:
        ours = -mine[n].detach().numpy() / 0.05
        theirs = -view.update.tensors[n].numpy() / 0.05
        total += np.exp(-depth[n]) * ((ours - theirs) ** 2).sum()
    reached = SHORT.matching_term(view, 2)(mine)
    assert float(reached.detach()) == pytest.approx(total / 4, rel=1e-10)


def test_what_was_sent_may_have_any_sign_and_scale() -> None:
    view, x, y, _ = seen()
    update = view.update
    twin = replace(update, sign=-1, scale=3.0,
                   tensors={n: -3 * t for n, t in update.tensors.items()})  # fmt: skip
    rounds = (replace(view.rounds[-1], update=twin),)
    other = view._copy({**view._fields, "rounds": rounds})
    values = [
        SHORT.matching_term(v, 2)(SHORT.simulate(v, 2)(x.repeat(2, 1, 1, 1), y.repeat(2)))
        for v in (view, other)
    ]
    torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=0)


# -- the priors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "responses"])
@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_the_order_prior_sees_no_order_and_vanishes_at_the_truth(kind: Any, distance: Any) -> None:
    view, x, _, order = seen(examples=4)
    s = epochs.summary(kind, 3, torch.Generator().manual_seed(1), x)
    torch.testing.assert_close(s(x), s(x[[2, 0, 3, 1]]))
    truth = epochs_in_order(x, order, 4)
    assert float(epochs.order_prior(truth, 2, s, distance)) < 1e-12
    moved = truth.clone()
    moved[0] += 1
    assert float(epochs.order_prior(moved, 2, s, distance)) > 1e-4
    assert view.num_examples == 4


def test_the_order_prior_is_the_mean_over_all_pairs() -> None:
    x = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    parts = [part.mean(0) for part in x.chunk(3)]
    expected = sum(float((a - b).square().mean()) for a in parts for b in parts) / 9
    found = epochs.order_prior(x, 3, lambda part: part.mean(0), "l2")
    assert float(found) == pytest.approx(expected)


def test_circular_variation_and_range_penalty_equal_their_formulas() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    a = x.numpy()
    rolled = (a - np.roll(a, -1, 3)) ** 2 + (a - np.roll(a, -1, 2)) ** 2
    assert float(priors.tv_circular(x)) == pytest.approx(rolled.sum((1, 2, 3)).mean())
    pixels = BOX.denormalize(x).numpy()
    expected = ((pixels - pixels.clip(0, 1)) ** 2).mean(0).sum()
    assert float(dlfa.outside(x, BOX)) == pytest.approx(expected)
    assert float(dlfa.outside(BOX.normalize(torch.rand(2, 3, 4, 4).double()), BOX)) == 0


def test_epochs_are_put_into_one_order_and_averaged() -> None:
    x = BOX.normalize(torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double())
    searched = torch.stack([x, x[[3, 1, 0, 2]], x[[1, 2, 3, 0]]])
    torch.testing.assert_close(epochs.merged(searched, BOX), x)


# -- labels ----------------------------------------------------------------------------------------


def test_counts_sum_to_the_batch_and_are_exact_from_the_batchs_own_statistics() -> None:
    view, x, y, _ = seen(protocol=FedAVG(epochs=1, batch_size=3, lr=0.05), examples=3)
    attack = replace(SHORT, dummies=200)
    counts = attack.count_labels(view, torch.Generator().manual_seed(0), Watch())
    assert int(counts.sum()) == 3 and int(counts.min()) >= 0
    model, g = view.model, mean_gradient(view)
    head = labels.find_head(model)
    own = labels.head_pass(model, head, x)
    raw = labels.dimitrov_bias(head.bias_grad(g), own, own, steps=1, samples=3)
    torch.testing.assert_close(raw, torch.bincount(y, minlength=10).double(), atol=1e-9, rtol=0)
    alone, _, y_alone, _ = seen(protocol=FedAVG(lr=0.05), examples=1)  # one feature sum: exact too
    g = mean_gradient(alone)
    own = labels.head_pass(alone.model, head, stage_of(examples=1).federation.clients[0].x)
    raw = labels.dimitrov(head.weight_grad(g), own, own, steps=1, samples=1)
    torch.testing.assert_close(raw, torch.bincount(y_alone, minlength=10).double(), atol=1e-9,
                               rtol=0)  # fmt: skip


def test_label_places_are_random_and_their_multiset_is_the_counted_one() -> None:
    view, _, _, _ = seen(examples=3)
    first = SHORT.read_labels(view, torch.Generator().manual_seed(0), Watch())
    counted = SHORT.count_labels(view, torch.Generator().manual_seed(0), Watch())
    assert torch.equal(torch.bincount(first, minlength=10), counted)
    granted, _, y, _ = seen(grants=LABELS)
    assert torch.equal(SHORT.read_labels(granted, torch.Generator(), Watch()), y)


# -- the whole attack ------------------------------------------------------------------------------


def test_images_of_their_own_explain_an_unknown_order_better_than_shared_ones() -> None:
    """Ablation on the matching loss, with the same labels and equal steps."""
    view, _, _, _ = seen(examples=3, grants=LABELS, protocol=replace(TWO_EPOCHS, lr=0.5))
    attack = replace(DLFA.tuned(), steps=120, dummies=8)
    own = attack(view).notes["matching_loss"]
    shared = replace(attack, images="shared")(view).notes["matching_loss"]
    assert own < shared


def test_the_order_prior_draws_the_epochs_together() -> None:
    view, _, _, _ = seen(examples=3, grants=LABELS)
    attack = replace(DLFA.tuned(), steps=40, dummies=8)
    together = attack(view).notes["disorder"]
    apart = replace(attack, order_weight=0.0)(view).notes["disorder"]
    assert together < 0.5 * apart


def test_a_granted_order_and_a_single_gradient_share_their_images() -> None:
    ordered, _, _, _ = seen(grants=frozenset({Grant.BATCH_ORDER}))
    assert SHORT(ordered).notes["epochs"] == 1
    single, _, _, _ = seen(protocol=FedSGD())
    found = SHORT(single)
    assert found.status == "complete" and found.notes["epochs"] == 1
    assert SHORT.outlook(single).verdict == "unknown"
    assert SHORT(seen()[0]).notes["epochs"] == 2
