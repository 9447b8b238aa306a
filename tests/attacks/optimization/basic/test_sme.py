from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.optimization.basic.sme import SME, between, returned
from leakatlas.bench import harness
from leakatlas.blocks.watch import Conduct, Watch
from leakatlas.errors import InvalidInput
from leakatlas.fl import FedAVG, FedSGD, Stage, Update, View
from leakatlas.metrics import images as image_metrics
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage, gradients_at

CASE = Case({"steps": 3, "restarts": 2}, {**LENET, "protocol": FedAVG(epochs=2)}, boxed=True)

LABELS = frozenset({Grant.LABELS})
STEPS = FedAVG(epochs=12, batch_size=2, lr=0.1, mode="eval")
"""Twelve local steps on the same two images, far enough for the weights to move."""


def scene(**changes: object) -> Stage:
    settings = {"letter": "C", "grants": LABELS, "protocol": STEPS}
    return build_stage(**{**settings, **changes})  # type: ignore[arg-type]  # a dict of settings


def view_of(stage: Stage) -> View:
    return harness.observe(stage, SME())[0]


def sending(view: View, update: Update) -> View:
    return view.with_rounds([replace(view.rounds[-1], update=update)], {})


def cosine_at(view: View, x: Tensor, alpha: float) -> float:
    """The matching loss by plain autograd at the surrogate model."""
    model, delta = view.model, view.update.tensors
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(alpha * delta[name])
    g = gradients_at(model, x, view.labels, F.cross_entropy)
    a = torch.cat([-g[name].flatten() for name in delta])
    b = torch.cat([t.flatten() for t in delta.values()])
    return 1 - float(F.cosine_similarity(a, b, dim=0))


def test_the_surrogate_runs_on_the_line_from_one_state_to_the_other() -> None:
    w_0, w_T = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
    assert between(w_0, w_T, torch.tensor(0.0))["w"].tolist() == [1.0, 2.0]
    assert between(w_0, w_T, torch.tensor(0.25))["w"].tolist() == [1.5, 1.0]
    assert between(w_0, w_T, torch.tensor(1.0))["w"].tolist() == [3.0, -2.0]


@pytest.mark.parametrize(
    ("kind", "sent", "sign", "scale"), [("delta", -2.0, -1, 2.0), ("weights", 2.0, 1, 0.5)]
)
def test_the_returned_state_undoes_sign_and_scale(
    kind: Literal["delta", "weights"], sent: float, sign: Literal[1, -1], scale: float
) -> None:
    """A step of +1 from weight 3."""
    update = Update(
        tensors={"w": torch.tensor([sent])}, kind=kind, state_hash="", num_examples=1,
        sign=sign, scale=scale,
    )  # fmt: skip
    assert returned({"w": torch.tensor([3.0])}, update)["w"].tolist() == [4.0]


def test_the_matching_loss_is_the_cosine_at_the_surrogate() -> None:
    view = view_of(scene())
    found = SME(steps=4, lr=0.1)(view)
    assert found.notes["alpha"] == pytest.approx(0.5, abs=0.01)
    by_hand = cosine_at(view, found.images, found.notes["alpha"])
    assert found.notes["matching_loss"] == pytest.approx(by_hand, rel=1e-9)


def test_between_the_states_the_true_images_match_better_than_at_either() -> None:
    """The paper's point: after many steps, the gradient of the batch points along within."""
    stage = scene()
    view = view_of(stage)
    truth = stage.box.normalize(harness.run_trial(stage, SME(steps=1)).truth.images.double())
    start, within, end = (cosine_at(view, truth, alpha) for alpha in (0.0, 0.5, 1.0))
    assert within < 0.5 * min(start, end)


def test_the_position_is_learned_and_helps() -> None:
    view = view_of(scene())
    tuned = SME.tuned(steps=120)
    learned = tuned(view)
    assert 0.0 < learned.notes["alpha"] < 1.0 and learned.notes["alpha"] != 0.5
    vanilla = replace(tuned, alpha=0.0)(view)
    assert vanilla.notes["alpha"] == 0.0
    assert learned.notes["matching_loss"] < 0.9 * vanilla.notes["matching_loss"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_position_without_a_step_size_or_at_an_end_stays(alpha: float) -> None:
    attack = SME(steps=5, alpha=alpha, alpha_lr=0.0 if alpha == 0.3 else 1.0)
    assert attack(view_of(scene())).notes["alpha"] == alpha


def test_a_batch_comes_back_and_the_received_state_is_the_wrong_place_to_ask() -> None:
    """The paper's own ingredient, taken away: one gradient at the state before the steps."""
    stage = scene(model="convnet", settings={"width": 4}, dtype=torch.float32)

    def reached(attack: SME) -> float:
        trial = harness.run_trial(stage, attack)
        truth = trial.truth.images
        grey = image_metrics.psnr(torch.full_like(truth, 0.5), truth).mean()
        return float(image_metrics.psnr(trial.images.clamp(0, 1), truth).mean() - grey)

    sme = SME.tuned(steps=100)
    between_states, at_the_first = reached(sme), reached(replace(sme, alpha=0.0))
    assert between_states > 2
    assert between_states > at_the_first + 1


def test_order_number_and_size_of_the_steps_do_not_enter() -> None:
    """With labels granted the protocol is not even read; replays of the steps need it."""
    view = view_of(scene())
    found = SME(steps=5)(view)
    torch.testing.assert_close(SME(steps=5)(view.without("protocol")).images, found.images)
    louder = {name: 3 * t for name, t in view.update.tensors.items()}
    same = SME(steps=5)(sending(view, replace(view.update, tensors=louder, scale=3.0)))
    torch.testing.assert_close(same.images, found.images, rtol=0, atol=1e-8)


def test_weights_are_attacked_as_the_delta_that_they_are() -> None:
    view = view_of(scene())
    held = dict(view.model.named_parameters())
    weights = {n: held[n].detach() + t for n, t in view.update.tensors.items()}
    found = SME(steps=5)(sending(view, replace(view.update, tensors=weights, kind="weights")))
    torch.testing.assert_close(found.images, SME(steps=5)(view).images, rtol=0, atol=1e-8)


def test_a_single_gradient_has_nothing_between() -> None:
    view = view_of(scene(protocol=FedSGD()))
    attack = SME(steps=5)
    assert attack(view).notes["alpha"] == 0.0
    assert attack.outlook(view).verdict == "applicable"


def test_outlooks_tell_steps_and_adam() -> None:
    plain = view_of(scene())
    assert "12 local steps" in SME().outlook(plain).reason
    adam = view_of(scene(protocol=replace(STEPS, optimizer="adam")))
    assert "Adam" in SME().outlook(adam).reason


def test_an_update_of_zeros_has_no_direction() -> None:
    view = view_of(scene())
    silent = {name: torch.zeros_like(t) for name, t in view.update.tensors.items()}
    found = SME(steps=2)(sending(view, view.update.with_tensors(silent)))
    assert found.status == "failed" and "zero" in found.reason


def test_finite_differences_are_refused_for_a_position_that_moves() -> None:
    watch = Watch(conduct=Conduct(execution="finite"))
    with pytest.raises(InvalidInput, match="not through weights"):
        SME(steps=2)(view_of(scene()), watch=watch)


def test_the_default_is_the_released_setting() -> None:
    sme = SME()
    assert (sme.steps, sme.lr, sme.alpha, sme.alpha_lr, sme.tv_weight) == (
        1_000, 1.0, 0.5, 1e-3, 1e-2,
    )  # fmt: skip
    assert (sme.schedule, sme.transform) == ("steps", "none")
