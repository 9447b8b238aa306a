from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from leakatlas.attacks.optimization.basic.dia import DIA, masks_of, off_rate
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.bench import harness
from leakatlas.fl import FedAVG, FedSGD, Stage, View
from leakatlas.metrics import images as image_metrics
from leakatlas.threat import Grant
from tests.attacks.case import Case
from tests.conftest import build_stage, relative_error

TRAIN = FedSGD(mode="train")
DROPPING = {"widths": (24, 16), "act": "gelu", "dropout": 0.5}

CASE = Case(
    {"steps": 3, "restarts": 2},
    {"model": "fc", "settings": DROPPING, "protocol": TRAIN},
    boxed=True,
)


def scene(*grants: Grant, **changes: object) -> Stage:
    settings = {
        "settings": DROPPING, "protocol": TRAIN, "examples": 1,
        "grants": frozenset({Grant.LABELS, *grants}),
    }  # fmt: skip
    return build_stage(**{**settings, **changes})  # type: ignore[arg-type]  # a dict of settings


def view_of(stage: Stage) -> View:
    return harness.observe(stage, DIA())[0]


def psnr(stage: Stage, attack: DIA | InvertingGradients) -> float:
    trial = harness.run_trial(stage, attack)
    return float(image_metrics.psnr(trial.images.clamp(0, 1), trial.truth.images).mean())


def test_a_mask_at_the_rate_costs_nothing_and_any_other_the_difference() -> None:
    assert float(off_rate(torch.tensor([1.0, 0.0, 1.0, 0.0]), 0.5)) == 0.0
    assert float(off_rate(torch.ones(4), 0.25)) == pytest.approx(0.25)
    assert float(off_rate(torch.tensor([0.25, 0.25]), 0.25)) == pytest.approx(0.5)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_places_and_rates_are_read_off_the_architecture(p: float) -> None:
    view = view_of(scene(settings={**DROPPING, "dropout": p}))
    (places,) = masks_of(view)
    assert [place.shape for place in places] == [(1, 24), (1, 16)]
    for place in places:
        assert place.keep == pytest.approx(1 - p) and place.high == pytest.approx(1 / (1 - p))


def test_the_true_image_under_the_true_masks_is_an_exact_zero() -> None:
    """And under any other masks it is none: this is what dropout hides."""
    stage = scene(Grant.DROPOUT_MASKS)
    view = view_of(stage)
    g = view.update.tensors
    x, replay = stage.federation.clients[0].x, view.without("dropout_masks").replayer()
    told = replay(x, view.labels, drawn=view.dropout_masks)
    assert relative_error(told, g) < 1e-12
    whole = replay(x, view.labels, drawn=[tuple(torch.ones_like(m) for m in view.dropout_masks[0])])
    assert relative_error(whole, g) > 1e-1


def test_the_objective_is_cosine_and_variation_and_rates() -> None:
    """After one step from masks at their mean: by plain autograd on the mean network."""
    view = view_of(scene())
    loud = DIA(steps=1, start="mean", tv_weight=0.5, mask_weight=2.0, lr=1e-12, mask_lr=1e-12)
    found = loud(view)
    model, x = view.model.eval(), found.images
    slopes = torch.autograd.grad(F.cross_entropy(model(x), view.labels), list(model.parameters()))
    a = torch.cat([s.flatten() for s in slopes])
    b = torch.cat([view.update.tensors[n].flatten() for n, _ in model.named_parameters()])
    variation = (x[..., 1:] - x[..., :-1]).abs().mean() + (
        x[..., 1:, :] - x[..., :-1, :]
    ).abs().mean()
    by_hand = 1 - F.cosine_similarity(a, b, dim=0) + 0.5 * variation
    assert found.notes["objective"] == pytest.approx(float(by_hand), rel=1e-6)


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_masks_found_are_between_masks_ignored_and_masks_granted(p: float) -> None:
    wide = {"widths": (96, 64), "act": "gelu", "dropout": p}
    known = InvertingGradients(steps=250, tv_weight=1e-2, schedule="cosine")
    ignored = psnr(scene(settings=wide, dtype=torch.float32), known)
    found = psnr(scene(settings=wide, dtype=torch.float32), DIA.tuned(steps=250))
    granted = psnr(scene(Grant.DROPOUT_MASKS, settings=wide, dtype=torch.float32), known)
    assert ignored + 3 < found < granted


def test_with_granted_masks_or_without_dropout_there_is_nothing_to_find() -> None:
    granted, none = scene(Grant.DROPOUT_MASKS), scene(settings={**DROPPING, "dropout": 0.0})
    for stage in (granted, none, scene(protocol=FedSGD())):
        found = DIA(steps=2)(view_of(stage))
        assert found.notes["masks"] == 0.0 and found.status == "complete"
        assert DIA().outlook(view_of(stage)).verdict == "applicable"


def test_the_outlook_counts_the_unknowns() -> None:
    assert "40 entries of masks beside 192" in DIA().outlook(view_of(scene())).reason


def test_every_local_step_has_masks_of_its_own() -> None:
    protocol = FedAVG(epochs=2, batch_size=2, lr=0.1)
    view = view_of(scene(protocol=protocol, examples=3))
    assert [[place.shape[0] for place in step] for step in masks_of(view)] == [
        [2, 2], [1, 1], [2, 2], [1, 1],
    ]  # fmt: skip
    found = DIA(steps=2)(view)
    assert found.notes["masks"] == 8.0 and found.status == "complete"


def test_masks_start_at_a_draw_or_at_their_mean() -> None:
    view = view_of(scene())
    drawn, mean = DIA(steps=1), DIA(steps=1, start="mean")
    assert drawn(view).notes["objective"] != mean(view).notes["objective"]
    assert replace(drawn, start="mean") == mean


def test_an_update_of_zeros_has_no_direction() -> None:
    view = view_of(scene())
    silent = {name: torch.zeros_like(t) for name, t in view.update.tensors.items()}
    seen = replace(view.rounds[-1], update=view.update.with_tensors(silent))
    found = DIA(steps=2)(view.with_rounds([seen], {}))
    assert found.status == "failed" and "zero" in found.reason


def test_the_default_is_the_released_setting() -> None:
    dia = DIA()
    assert (dia.steps, dia.lr, dia.mask_lr, dia.tv_weight, dia.mask_weight, dia.start) == (
        20_000, 0.1, 0.1, 1e-5, 1e-4, "drawn",
    )  # fmt: skip
