from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.optimization.basic import tgias_ro
from leakatlas.attacks.optimization.basic.tgias_ro import TGIAsRO
from leakatlas.bench import harness
from leakatlas.blocks import descent, init, matching
from leakatlas.blocks.watch import Watch
from leakatlas.fl import FedSGD, Stage, View, stream
from leakatlas.threat import Grant
from tests.attacks.case import Case
from tests.conftest import build_stage, photos

SCENE = {"model": "lenet", "settings": {"width": 4}, "rounds": 3}
CASE = Case({"steps": 3, "local": 2}, SCENE, boxed=True)
SHORT = TGIAsRO(steps=3, local=2)
LABELS = frozenset({Grant.LABELS})


def stage_of(**changes: Any) -> Stage:
    settings = {**SCENE, "protocol": FedSGD(lr=1.0), "letter": "B", "grants": LABELS, **changes}
    return build_stage(**settings)


def seen(**changes: Any) -> tuple[View, Tensor]:
    stage = stage_of(**changes)
    view, _ = harness.observe(stage, SHORT)
    return view, stage.federation.clients[0].x


def with_order(view: View, order: Sequence[int]) -> View:
    return view._copy({**view._fields, "rounds": tuple(view.rounds[t] for t in order)})


def distances(view: View) -> list[tgias_ro.Distance]:
    y = view.labels

    def at(t: int) -> tgias_ro.Distance:
        replay, g = view.replayer(round=t), dict(view.update_at(t).tensors)
        return lambda x: matching.relative_l2(replay(x, y), g)

    return [at(t) for t in range(len(view.rounds))]


# -- what rounds add: a logistic model of 20 inputs without bias, batch of 4 -----------------------


def logistic(T: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``(T, 20)``, inputs ``(4, 20)`` and labels of the batch."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.5 * torch.randn(T, 20, generator=generator, dtype=torch.float64)
    x = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    return weights, x, torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def gradients(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean loss, for all weights, flat."""
    error = torch.sigmoid(x @ weights.T) - y[:, None]
    return (error.T @ x / len(x)).flatten()


@pytest.mark.parametrize("T", [1, 2, 3, 4, 6, 10])
def test_every_round_adds_twenty_equations_until_all_eighty_are_there(T: int) -> None:
    weights, x, y = logistic(T)
    jacobian = torch.autograd.functional.jacobian(lambda z: gradients(weights, z, y), x)
    rank = torch.linalg.matrix_rank(jacobian.reshape(20 * T, 80), rtol=1e-8)
    assert int(rank) == 20 * min(T, 4)


def gauss_newton(T: int, seed: int) -> tuple[float, float]:
    """Distance to the truth and residual, from a start near by."""
    weights, truth, y = logistic(T, seed)
    g = gradients(weights, truth, y)
    generator = torch.Generator().manual_seed(100 + seed)
    x = truth + 0.05 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    for _ in range(30):
        jacobian = torch.autograd.functional.jacobian(lambda z: gradients(weights, z, y), x)
        residual = gradients(weights, x, y) - g
        step = torch.linalg.lstsq(jacobian.reshape(20 * T, 80), residual, driver="gelsd").solution
        x = x - step.reshape(4, 20)
    return float((x - truth).abs().max()), float((gradients(weights, x, y) - g).abs().max())


@pytest.mark.parametrize("seed", range(5))
def test_ten_rounds_return_to_the_truth_and_one_or_two_satisfy_every_equation_elsewhere(
    seed: int,
) -> None:
    assert gauss_newton(10, seed)[0] < 1e-12
    for T in (1, 2):
        error, residual = gauss_newton(T, seed)
        assert residual < 1e-12 and error > 0.02


# -- robust statistics -----------------------------------------------------------------------------


def test_the_median_of_an_even_number_is_the_midpoint() -> None:
    x = torch.tensor([[4.0], [1.0], [10.0], [2.0]])
    assert tgias_ro.middle(x).tolist() == [3.0]
    assert tgias_ro.middle(x[:3]).tolist() == [4.0]
    assert tgias_ro.trimmed_mean(x, 0.25).tolist() == [3.0]
    assert tgias_ro.trimmed_mean(x, 0.0).tolist() == [4.25]
    assert tgias_ro.trimmed_mean(x[:1], 0.4).tolist() == [4.0]


def test_krum_returns_one_of_its_inputs_and_not_the_outlier() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(7, 2, 3, 4, generator=generator) * 0.1
    points[2] += 50
    points[5] -= 40
    chosen = tgias_ro.krum(points)
    assert any(torch.equal(chosen, point) for point in points)
    assert float(chosen.abs().max()) < 1
    assert torch.equal(tgias_ro.krum(points[:1]), points[0])


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "mean"])
def test_the_order_of_points_does_not_matter(rule: tgias_ro.Rule) -> None:
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = tgias_ro.aggregate(points, rule)
    again = tgias_ro.aggregate(points[[3, 0, 4, 2, 1]], rule)
    torch.testing.assert_close(found, again, rtol=1e-14, atol=1e-14)


# -- the loop --------------------------------------------------------------------------------------


def test_every_distance_vanishes_at_the_truth() -> None:
    view, x = seen()
    states = [round_view.state["fc.weight"] for round_view in view.rounds]
    assert not torch.equal(states[0], states[1])
    assert all(float(distance(x).detach()) < 1e-20 for distance in distances(view))


@pytest.mark.parametrize("fuse", ["points", "gradients"])
def test_one_round_is_plain_descent(fuse: Literal["points", "gradients"]) -> None:
    """The base attack: Adam along a cosine, on one distance, boxed."""
    view, _ = seen(rounds=1)
    attack = TGIAsRO(steps=8, local=1, fuse=fuse, distance="relative_l2")
    (distance,) = distances(view)
    like = next(iter(view.update.tensors.values()))
    start = init.normal(view.batch_shape, generator=stream("tgias_ro", "run", 0), like=like)

    def unit(slope: Tensor) -> Tensor:
        return slope if fuse == "points" else slope / slope.norm()

    base = descent.descend(
        lambda variables, t: distance(variables["x"]), {"x": start},
        optimizer=descent.adam(0.1), steps=8, watch=Watch(), transform=unit,
        schedule=descent.cosine_decay(), after=(descent.inside(view.box, "x"),),
    )  # fmt: skip
    found = attack.search(start, [distance], view.box, Watch())
    # ours measures before every step, so its last fused point was never measured
    assert found.fusions == 8
    assert found.loss >= float(base.criterion)
    seven = descent.descend(
        lambda variables, t: distance(variables["x"]), {"x": start},
        optimizer=descent.adam(0.1), steps=7, watch=Watch(), transform=unit,
        schedule=lambda progress: descent.cosine_decay()(progress * 7 / 8),
        after=(descent.inside(view.box, "x"),),
    )  # fmt: skip
    torch.testing.assert_close(found.x, seven.best["x"], rtol=1e-9, atol=1e-9)
    assert found.loss == pytest.approx(float(seven.criterion))


@pytest.mark.parametrize("rule", ["median", "mean"])
def test_the_order_of_rounds_does_not_matter(rule: tgias_ro.Rule) -> None:
    view, _ = seen()
    attack = replace(SHORT, rule=rule)
    found = attack.search(noise(view), distances(view), view.box, Watch())
    others = distances(with_order(view, [2, 0, 1]))
    again = attack.search(noise(view), others, view.box, Watch())
    torch.testing.assert_close(found.x, again.x, rtol=1e-8, atol=1e-8)


def noise(view: View) -> Tensor:
    shape = view.batch_shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lying(view: View, *which: int) -> View:
    """The view with noise of the update's own norm in some rounds."""
    generator = torch.Generator().manual_seed(5)
    rounds = list(view.rounds)
    for t in which:
        update = rounds[t].update
        assert update is not None
        sent = update.tensors
        noise = {n: torch.randn(g.shape, generator=generator).to(g) for n, g in sent.items()}
        share = norm(sent) / norm(noise)
        wrong = replace(update, tensors={n: share * g for n, g in noise.items()})
        rounds[t] = replace(rounds[t], update=wrong)
    return view._copy({**view._fields, "rounds": tuple(rounds)})


def norm(g: Mapping[str, Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in g.values()]).norm())


def reached(view: View, attack: TGIAsRO, start: Tensor, x: Tensor) -> float:
    """PSNR of the search's answer to ``x``, in dB."""
    found = attack.search(start, distances(view), view.box, Watch()).x
    wrong = view.box.denormalize(found) - view.box.denormalize(x)
    return float(-10 * wrong.square().mean((1, 2, 3)).log10().mean())


def beside_the_truth() -> tuple[View, Tensor, Tensor]:
    """Ten rounds, the batch, and a start in its neighbourhood."""
    view, x = seen(rounds=10, settings={"width": 2})
    apart = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    return view, x, view.box.clip(x + 0.1 * apart)


def test_noise_in_two_rounds_of_ten_costs_the_mean_decibels_and_the_median_next_to_nothing() -> (
    None
):
    """Of the published loop, whose rounds go ten steps of their own between two fusions."""
    view, x, start = beside_the_truth()
    cost: dict[str, float] = {}
    rules: tuple[tgias_ro.Rule, ...] = ("median", "mean")
    for rule in rules:
        attack = TGIAsRO(steps=6, local=10, lr=0.05, rule=rule)
        cost[rule] = reached(view, attack, start, x) - reached(lying(view, 2, 6), attack, start, x)
    assert cost["mean"] > 2.0
    assert abs(cost["median"]) < 0.5


def test_slopes_of_norm_one_leave_noise_no_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then even the mean bears it; of slopes as they are, large noise has the only say."""
    view, x, start = beside_the_truth()
    loud = lying(view, 2, 6)

    def squared(view: View, factor: float) -> list[tgias_ro.Distance]:
        y = view.labels

        def at(t: int) -> tgias_ro.Distance:
            scale = factor if t in (2, 6) else 1.0
            replay = view.replayer(round=t)
            g = {n: scale * tensor for n, tensor in view.update_at(t).tensors.items()}
            return lambda x: matching.squared_l2(replay(x, y), g)

        return [at(t) for t in range(10)]

    attack = TGIAsRO(steps=40, lr=0.05, rule="mean", fuse="gradients")
    ends = {}
    for kind in ("one", "as they are"):
        for name, given in (("clean", squared(view, 1.0)), ("noise", squared(loud, 10.0))):
            found = attack.search(start, given, view.box, Watch()).last
            ends[kind, name] = float((found - x).square().mean().sqrt())
        monkeypatch.setattr(tgias_ro, "norm_of", lambda slope: slope.new_ones(()))
    assert ends["one", "noise"] < 1.5 * ends["one", "clean"]
    assert ends["as they are", "noise"] > 3 * ends["as they are", "clean"]


def test_faulty_rounds_do_not_move_the_median_from_the_truth_and_move_the_mean() -> None:
    view, x = seen(rounds=5)
    honest, faulty = distances(view), distances(lying(view, 1, 3))
    moved: dict[str, float] = {}
    rules: tuple[tgias_ro.Rule, ...] = ("median", "trimmed", "mean")
    for rule in rules:
        attack = TGIAsRO(steps=5, local=3, rule=rule, trim=0.4)
        found = attack.search(x, faulty, view.box, Watch())
        moved[rule] = float((found.last - x).abs().max())
    assert all(float(distance(x).detach()) < 1e-20 for distance in honest)
    assert moved["median"] < 1e-6 and moved["trimmed"] < 1e-6
    assert moved["mean"] > 1e-2


def test_rounds_on_different_batches_agree_on_nothing() -> None:
    """What the method presumes; with one batch the same search goes on falling."""
    view, x = seen(rounds=3)
    others = [seen(rounds=3, victims=photos(8, 8).subset([k, k + 1]))[0] for k in (2, 4)]
    rounds = (view.rounds[0], others[0].rounds[1], others[1].rounds[2])
    mixed = view._copy({**view._fields, "rounds": rounds})
    attack = TGIAsRO(steps=80, local=1, distance="relative_l2")
    same, different = attack(view), attack(mixed)
    assert same.notes["robust_loss"] < 0.5 * different.notes["robust_loss"]
    at_truth = sorted(float(distance(x).detach()) for distance in distances(mixed))
    assert at_truth[0] < 1e-20 and at_truth[1] > 1e-3
    assert attack.outlook(view).reason.startswith("presumes that 3 rounds")


def emptied(view: View, *which: int) -> View:
    """The view with updates of zeros in some rounds."""
    rounds = list(view.rounds)
    for t in which:
        update = rounds[t].update
        assert update is not None
        zeros = {n: torch.zeros_like(tensor) for n, tensor in update.tensors.items()}
        rounds[t] = replace(rounds[t], update=replace(update, tensors=zeros))
    return view._copy({**view._fields, "rounds": tuple(rounds)})


@pytest.mark.parametrize("distance", ["relative_l2", "cosine"])
def test_a_round_of_zeros_takes_nothing_from_the_others(
    distance: Literal["relative_l2", "cosine"],
) -> None:
    view, _ = seen()
    attack = replace(SHORT, distance=distance)
    found, without = attack(emptied(view, 1)), attack(with_order(view, [0, 2]))
    torch.testing.assert_close(found.images, without.images, rtol=0, atol=0)
    assert (found.notes["rounds"], found.notes["rounds_of_zeros"]) == (2, 1)


def test_rounds_of_zeros_alone_are_refused() -> None:
    view, _ = seen()
    found = SHORT(emptied(view, 0, 1, 2))
    assert found.status == "failed" and "every update is zero" in found.reason


def test_more_rounds_bring_the_search_nearer_to_the_batch() -> None:
    view, x = seen(rounds=6, examples=3, settings={"width": 2})
    attack = TGIAsRO(steps=150, local=1, distance="relative_l2", most=6)
    errors = []
    for order in ([5], [0, 1, 2, 3, 4, 5]):
        found = attack(with_order(view, order), seed=1)
        errors.append(float((found.images - x).square().mean()))
    assert errors[1] < errors[0]


def test_counts_are_the_median_of_all_rounds() -> None:
    view, _ = seen(rounds=3, examples=3, grants=frozenset())
    granted, _ = seen(rounds=3, examples=3)
    truth = torch.bincount(granted.labels, minlength=10)
    found = SHORT.read_labels(view, [0, 1, 2])
    assert torch.equal(torch.bincount(found, minlength=10), truth)
    wrong = view.rounds[1].update
    assert wrong is not None
    spoilt = replace(wrong, tensors={n: 100 * torch.ones_like(t) for n, t in wrong.tensors.items()})
    rounds = (view.rounds[0], replace(view.rounds[1], update=spoilt), view.rounds[2])
    other = view._copy({**view._fields, "rounds": rounds})
    assert torch.equal(torch.bincount(SHORT.read_labels(other, [0, 1, 2]), minlength=10), truth)


def test_rounds_are_spread_out_and_the_last_is_among_them() -> None:
    view, _ = seen(rounds=5)
    assert tgias_ro.readable_rounds(view, 10) == [0, 1, 2, 3, 4]
    assert tgias_ro.readable_rounds(view, 3) == [0, 2, 4]
    assert tgias_ro.readable_rounds(view, 1) == [4]
    assert SHORT(with_order(view, [4])).notes["rounds"] == 1
    assert SHORT.outlook(with_order(view, [4])).reason.startswith("one round")
