from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from leakatlas import models
from leakatlas.defenses.formal.dp.client_dp import ClientDP
from leakatlas.defenses.heuristic.learning.dcs2 import DCS2, Goal, drawn_back
from leakatlas.errors import IncompatibleDefenses
from leakatlas.fl import replay
from leakatlas.threat import Grant
from tests.conftest import build_stage, relative_error
from tests.defenses.heuristic.probes import (
    a_context,
    first_layer_readout,
    observed,
    random_tensors,
    replayed,
)

QUICK = DCS2(iterations=12)
SMALL: dict[str, Any] = {"width": 4}


def _goal(count: int = 2) -> tuple[Goal, Tensor, Tensor, Tensor]:
    model = models.build("convnet", size=8, **SMALL).double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 8, 8, generator=draw, dtype=torch.float64)
    start = torch.randn(count, 3, 8, 8, generator=draw, dtype=torch.float64)
    y = torch.arange(count)
    return Goal.of(a_context(model, x), x, y), start, y + 3, y


def test_the_objective_is_the_formula() -> None:
    goal, x_c, y_c, y_s = _goal()
    model = goal.context.model

    def flat(x: Tensor, y: Tensor) -> Tensor:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    cosine = torch.cosine_similarity(flat(goal.x, y_s), flat(x_c, y_c), dim=0)
    away = torch.stack([(a - b).norm() for a, b in zip(x_c, goal.x, strict=True)]).mean()
    logits = [(model(a[None]), model(b[None])) for a, b in zip(x_c, goal.x, strict=True)]
    apart = torch.stack([(a - b).norm() / b.norm() for a, b in logits]).mean()
    expected = 1 - cosine + torch.exp(-0.01 * away) + 0.01 * (apart - 0.01)
    torch.testing.assert_close(QUICK.objective(goal, x_c, y_c), expected)


def test_the_search_never_ends_above_its_start() -> None:
    goal, x_c, y_c, y_s = _goal()
    values = [float(QUICK.objective(goal, x_c, y_c).detach())]
    for iterations in (1, 32):
        defense = DCS2(iterations=iterations)
        context = a_context(goal.context.model, goal.x)
        found = defense.concealed(context, goal.x, y_s, x_c, y_c)
        values.append(float(defense.objective(goal, found, y_c).detach()))
    assert values[1] <= values[0]
    assert values[2] < values[0] - 0.02


def test_the_search_ends_where_samples_are_far_enough() -> None:
    goal, x_c, y_c, y_s = _goal()
    at_once = DCS2(iterations=50, enough=1e-3)
    assert torch.equal(at_once.concealed(goal.context, goal.x, y_s, x_c, y_c), x_c)


def test_what_points_away_is_drawn_back() -> None:
    g = random_tensors()
    assert drawn_back(g, g, 0.5).keys() == g.keys()
    assert all(torch.equal(drawn_back(g, g, 0.5)[n], g[n]) for n in g)
    for seed in range(1, 30):
        sent = {n: t - 0.2 * g[n] for n, t in random_tensors(seed).items()}
        kept = drawn_back(sent, g, 0.5)
        assert float(sum((kept[n] * g[n]).sum() for n in g)) >= 0


@pytest.mark.parametrize("seed", range(6))
def test_the_closed_form_solves_the_released_programme(seed: int) -> None:
    """``min 1/2 v P v - q v`` over ``v >= margin``, by a general solver."""
    generator = np.random.default_rng(seed)
    g, sent = generator.normal(size=20), generator.normal(size=20)
    sent = sent - 2 * g
    P, q, margin = g @ g + 1e-3, -(g @ sent), 0.5

    def programme(v: np.ndarray) -> float:
        return float(0.5 * P * v[0] ** 2 - q * v[0])

    solved = minimize(programme, [1.0], bounds=[(margin, None)])
    expected = sent + solved.x[0] * g
    found = drawn_back({"w": torch.from_numpy(sent)}, {"w": torch.from_numpy(g)}, margin)["w"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("share", "per_image"), [(0.34, 1), (1.0, 1), (1.0, 2)])
def test_the_step_is_the_formula_on_what_the_search_found(share: float, per_image: int) -> None:
    defense = DCS2(iterations=3, share=share, per_image=per_image)
    view, x = observed(defense, grants=frozenset({Grant.LABELS, Grant.DEFENSE_SECRETS}))
    x_c, y_c = (next(t for n, t in view.secrets.items() if n.endswith(w)) for w in ("x_c", "y_c"))
    s = defense.sensitive(3)
    assert len(x_c) == s * per_image
    y_s = view.labels[-s:].repeat_interleave(per_image)
    assert not bool((y_c == y_s).any())
    model = view.model
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def mixed(logits: Tensor, y: Tensor) -> Tensor:
        return defense.mixed_loss(torch.nn.functional.cross_entropy, logits, y, y_s)

    sent = replay.gradient(
        model, parameters, buffers, torch.cat([x, x_c]), torch.cat([view.labels, y_c]),
        loss=mixed, create_graph=False,
    )  # fmt: skip
    honest = replay.gradient(model, parameters, buffers, x, view.labels, create_graph=False)
    expected = drawn_back(sent, honest, defense.margin)
    assert relative_error(expected, dict(view.update.tensors)) < 1e-9
    assert relative_error(replayed(view, x), dict(view.update.tensors)) > 0.05


def test_mixed_labels_are_thirds_or_halves() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
    y, y_s = torch.tensor([0, 1, 2, 3]), torch.tensor([4])
    ce = torch.nn.functional.cross_entropy
    own, c, s = ce(logits[:3], y[:3]), ce(logits[3:], y[3:]), ce(logits[3:], y_s)
    for mix, expected in (
        (0.7, (own + 0.7 * c + 0.3 * s) / 3), (1.0, (own + c) / 2), (0.0, (own + s) / 2)
    ):  # fmt: skip
        torch.testing.assert_close(DCS2(mix=mix).mixed_loss(ce, logits, y, y_s), expected)


def test_the_order_of_the_batch_is_kept() -> None:
    context = a_context(models.build("convnet", size=8, **SMALL).double())
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor([4, 1, 4])
    context.x, context.y = x, y
    found, labels = DCS2(iterations=1, share=0.34).batch(x, y, context)
    assert torch.equal(found[:3], x)
    assert torch.equal(labels[:3], y)
    assert len(found) == 5
    assert labels[3:].tolist() == [4, 1]  # of other classes than the two that are concealed


def test_one_image_is_concealed_by_noise_under_another_label() -> None:
    found, x = first_layer_readout(QUICK)
    # The mixture of two images that the ratio reads is neither.
    assert float((found - x).abs().max()) > 0.05


def test_examples_that_are_accounted_for_are_not_mixed() -> None:
    with pytest.raises(IncompatibleDefenses, match="changes the batch"):
        build_stage(
            model="convnet", settings={"width": 4, "norm": "group"},
            defenses=(QUICK, ClientDP(unit="example")),
        )  # fmt: skip


def test_its_cost_is_said() -> None:
    model = models.build("lenet", size=8)
    assert DCS2().workload(model) > 1_000
    assert DCS2(share=0.0).workload(model) == 1
