from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.analytic.isolation.mkor import (
    MKOR,
    interpolate,
    plan,
    read_images,
    set_convolutions,
    set_head,
    smooth,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.data import Box, ImageSet
from leakatlas.defenses.formal.crypto.secure_aggregation import SecureAggregation
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, Stage
from leakatlas.models import CNN6, VGG, ConvNet, LeNet, LeNet5, ResNet, build
from leakatlas.threat import Vantage
from tests.attacks.analytic.support import (
    UNIT,
    crops,
    errors,
    psnr,
    same_after_saving,
    small_stage,
)
from tests.attacks.case import Case
from tests.conftest import BOX, gradients_at

CASE = Case({}, {"model": "lenet", "settings": {}}, boxed=True)

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "strided": ("lenet", {"width": 48}),
    "averaged": ("lenet5", {"widths": (12, 48), "padding": 2, "hidden": (40, 30)}),
    "no convolution": ("fc", {"widths": (40, 30)}),
    "head only": ("fc", {"widths": ()}),
}
"""Models with room for every shifted copy, whose read-out has nothing to bound."""


def _stage(model: str, settings: Mapping[str, Any], labels: list[int], **scene: Any) -> Stage:
    images = crops(16, len(labels)).images
    victims = ImageSet(images, torch.tensor(labels), tuple(map(str, range(10))), "crops")
    chosen = {"letter": "F", "examples": len(labels), "box": BOX, "size": 16, **scene}
    return small_stage(model=model, settings=settings, victims=victims, **chosen)


def _features(trial: Trial) -> Tensor:
    """The true input of the first linear layer, on the model that the client received."""
    model = trial.view.model
    seen: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    handle = first.register_forward_hook(lambda _m, given, _o: seen.append(given[0].detach()))
    model(trial.view.box.normalize(trial.truth.images.double()))
    handle.remove()
    return seen[0]


# -- exactness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("box", [BOX, UNIT], ids=["normalised", "plain"])
def test_copies_give_every_unique_class_exactly_with_its_label(kind: str, box: Box) -> None:
    labels = [7, 1, 4, 0, 9]
    model, settings = EXACT[kind]
    trial = run_trial(_stage(model, settings, labels, box=box), MKOR())
    assert trial.found.status == "complete", trial.found.reason
    assert float(errors(trial).max()) < 1e-6
    assert trial.found.labels is not None and trial.found.labels.tolist() == sorted(labels)
    order = torch.tensor(labels).argsort()
    assert torch.allclose(trial.images, trial.truth.images[order].double(), atol=1e-6)


def test_float32_gives_a_picture() -> None:
    model, settings = EXACT["averaged"]
    trial = run_trial(_stage(model, settings, [3, 5], dtype=torch.float32), MKOR())
    assert trial.found.images.dtype == torch.float32 and float(psnr(trial).min()) > 60


def test_examples_of_one_class_are_averaged_and_marked() -> None:
    trial = run_trial(_stage(*EXACT["strided"], [2, 2, 5]), MKOR())
    assert trial.found.label_counts is not None and trial.found.confidence is not None
    assert trial.found.label_counts.tolist() == [0, 0, 2, 0, 0, 1, 0, 0, 0, 0]
    assert trial.found.confidence.tolist() == [0.5, 1.0]
    wrong = errors(trial)
    assert float(wrong[2]) < 1e-6 < float(wrong[:2].min())
    assert trial.found.notes["classes_unique"] == 1


def test_a_lossy_grid_is_interpolated_between_exact_pixels() -> None:
    """12 channels carry one shifted layer of 3 colours: every second pixel is exact."""
    trial = run_trial(_stage("lenet", {"width": 12}, [1, 6]), MKOR())
    truth = trial.truth.images.double()
    assert torch.allclose(trial.images[..., ::2, ::2], truth[..., ::2, ::2], atol=1e-6)
    assert float(errors(trial).min()) > 1e-3


def test_the_classical_lenet_loses_its_border() -> None:
    """Without padding in the second convolution the outer pixels are never read."""
    stage = small_stage(
        letter="F", model="lenet5", settings={"widths": (12, 48), "hidden": (40, 30)}, size=32,
        examples=2, victims=crops(32, 2), box=BOX,
    )  # fmt: skip
    trial = run_trial(stage, MKOR())
    wrong = (trial.images - trial.truth.images).square().mean(dim=(0, 1))
    inner = wrong[6:26, 6:26].mean()
    assert float(inner) < float(wrong[:3].mean()) / 3
    assert float(inner) > 1e-6  # one equation short, in each direction


# -- bounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "shifted"),
    [
        ("convnet", {"width": 32}, 2),
        ("convnet", {"width": 8}, 1),
        ("vgg6", {"groups": (1, 1, 1), "width": 24, "hidden": (20, 15)}, 2),
        ("vgg6", {"groups": (1, 2), "width": 20}, 1),
    ],
)
def test_bounds_bracket_every_pixel_and_shifts_tighten_them(
    model: str, settings: dict[str, Any], shifted: int
) -> None:
    if model == "vgg6":
        live: nn.Module = VGG(size=16, **settings)
    else:
        live = build(model, size=16, **settings)
    stage = small_stage(
        letter="F", live=live, box=BOX, size=16, examples=3,
        victims=_stage("fc", {}, [0, 3, 8]).victims[0],
    )  # fmt: skip
    trial = run_trial(stage, MKOR(smoothing=0))
    layout = plan(trial.view.model, (3, 16, 16))
    assert layout.bounded and sum(layer.shifts == (2, 2) for layer in layout.layers) == shifted
    upper, lower = read_images(_features(trial), layout, BOX)
    truth = trial.truth.images.double()
    assert bool((upper >= truth - 1e-9).all()) and bool((lower <= truth + 1e-9).all())
    assert torch.allclose(trial.images, (upper + lower) / 2, atol=1e-6)  # from the gradient alone
    assert float((upper - lower).mean()) == pytest.approx(trial.found.notes["gap"], abs=1e-6)
    assert float(errors(trial).max()) < float((truth - truth.mean()).square().mean().sqrt())


def test_more_shifted_copies_mean_tighter_bounds() -> None:
    gaps = [
        run_trial(_stage("convnet", {"width": width}, [0, 1]), MKOR()).found.notes["gap"]
        for width in (6, 24)
    ]
    assert gaps[0] > 1.2 * gaps[1]


def test_the_paper_s_vgg16_plan() -> None:
    """Shifts before the last three of five pools: 6, 24, 96 and 384 of 512 channels."""
    layout = plan(build("vgg16", size=32, hidden=(64, 64)), (3, 32, 32))
    assert [layer.paths for layer in layout.layers] == [6] * 7 + [24] * 3 + [96] * 3
    shifted = [i for i, layer in enumerate(layout.layers) if layer.shifts == (2, 2)]
    assert shifted == [6, 9, 12]
    assert layout.features == (512, 1, 1)


# Seen once in the released code, wfwf10/MKOR, commit fc45066da6c98e6d4bd59975e7945bc0975c55bc:
# VGG16.reconstruct_single_class on one row of weight gradients -0.3 f and the bias gradient -0.3,
# f = torch.rand(25088) in float64 from a generator seeded with 5, rounded to float32. Tolerance
# 1e-6, for its float32.
OFFICIAL = {
    (0, 0, 0): 0.542464,
    (0, 100, 37): 0.495089,
    (1, 111, 112): 0.493442,
    (2, 223, 223): 0.475415,
    (1, 5, 218): 0.514007,
    (2, 64, 3): 0.424037,
}
OFFICIAL_MEAN = 0.4988408386707306


def test_the_read_out_of_vgg16_equals_the_released_code() -> None:
    f = torch.rand(1, 25_088, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    layout = plan(build("vgg16", size=224), (3, 224, 224))
    upper, lower = read_images(f, layout, UNIT)
    image = smooth((upper + lower) / 2, 10.0).clamp(0, 1)[0]
    for place, value in OFFICIAL.items():
        assert float(image[place]) == pytest.approx(value, abs=1e-6)
    assert float(image.mean()) == pytest.approx(OFFICIAL_MEAN, abs=1e-6)


# -- the head --------------------------------------------------------------------------------------


def test_an_absent_class_makes_cross_entropy_equal_raw_logits_and_the_plain_ratio_is_wrong() -> (
    None
):
    """The released loss isolates by itself; softmax needs the correction."""
    stage = _stage(*EXACT["averaged"], [0, 2, 5])
    trial = run_trial(stage, MKOR())
    client = stage.federation.clients[0]
    raw = gradients_at(
        trial.view.model, client.x, client.y, lambda logits, y: F.nll_loss(logits, y)
    )
    names = ("hidden.0.weight", "hidden.0.bias")
    w, b = (raw[name] for name in names)
    g_w, g_b = (trial.view.update.tensors[name] for name in names)
    for c in (0, 2, 5):
        by_raw_logits = w[c] / b[c]
        corrected = (g_w[c] - g_w[9]) / (g_b[c] - g_b[9])
        plain = g_w[c] / g_b[c]
        assert torch.allclose(corrected, by_raw_logits, atol=1e-9)
        assert float((plain - by_raw_logits).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", EXACT)
def test_rows_beyond_the_classes_have_no_gradient_and_all_logits_are_equal(kind: str) -> None:
    trial = run_trial(_stage(*EXACT[kind], [1, 3]), MKOR())
    view = trial.view
    logits = view.model(BOX.normalize(trial.truth.images.double())).detach()
    assert float((logits - logits[:, :1]).abs().max()) < 1e-12
    layout = plan(view.model, view.input_shape)
    g_w = view.update.tensors[f"{layout.dense}.weight"]
    assert not bool(g_w[view.classes :].any()) and bool(g_w[: view.classes].any(dim=1).all())


def test_with_all_classes_present_it_is_undefined_and_reported() -> None:
    stage = _stage(*EXACT["strided"], list(range(10)))
    trial = run_trial(stage, MKOR())
    assert trial.found.status == "failed" and "every class occurs" in trial.found.reason
    assert len(trial.images) == 0 and trial.found.notes["classes_present"] == 10
    assert MKOR().outlook(trial.view).verdict == "unknown"


def test_the_sink_reads_all_classes_but_its_own() -> None:
    trial = run_trial(_stage(*EXACT["strided"], list(range(10))), MKOR(isolate="sink"))
    wrong = errors(trial)
    assert float(wrong[:9].max()) < 1e-6 < float(wrong[9])
    assert trial.found.label_counts is not None and trial.found.label_counts.tolist() == [1] * 10
    assert MKOR(isolate="sink").outlook(trial.view).verdict == "applicable"


def test_a_batch_in_the_sink_alone_shows_nothing() -> None:
    trial = run_trial(_stage(*EXACT["strided"], [9, 9]), MKOR(isolate="sink"))
    assert trial.found.status == "failed" and "no class shows" in trial.found.reason


def test_secure_aggregation_does_not_help_if_classes_are_unique() -> None:
    stage = _stage(
        *EXACT["strided"], [0, 3, 4, 8], clients=2, examples=2, vantage=Vantage.AGGREGATE,
        defenses=(SecureAggregation(ring_bits=64, clip_range=1e3),),
    )  # fmt: skip
    trial = run_trial(stage, MKOR())
    assert len(trial.truth.images) == 4
    assert float(errors(trial).max()) < 1e-3


def test_one_local_step_works_and_several_only_roughly() -> None:
    one = run_trial(_stage(*EXACT["strided"], [1, 4], protocol=FedAVG(batch_size=2)), MKOR())
    assert float(errors(one).max()) < 1e-6
    several = _stage(*EXACT["strided"], [1, 4], protocol=FedAVG(batch_size=2, epochs=3, lr=1.0))
    trial = run_trial(several, MKOR())
    assert float(errors(trial).max()) > 1e-6
    assert MKOR().outlook(trial.view).verdict == "unknown"


# -- surgery ---------------------------------------------------------------------------------------


def test_only_path_channels_and_the_head_change_and_no_shape_does() -> None:
    model, before = ConvNet(size=16), ConvNet(size=16)
    layout = plan(model, (3, 16, 16))
    set_convolutions(model, layout, UNIT)
    set_head(model, layout, UNIT, sink=False)
    named = dict(model.named_parameters())
    for name, old in before.named_parameters():
        assert named[name].shape == old.shape
    for layer in layout.layers:
        used = layer.paths * layer.shifts[0] * layer.shifts[1]
        weight, old = (dict(m.named_modules())[layer.conv].weight for m in (model, before))
        assert isinstance(weight, Tensor) and isinstance(old, Tensor)
        assert torch.equal(weight[used:], old[used:])
        assert bool(((weight[:used] != 0).flatten(1).sum(dim=1) == 1).all())
    assert torch.equal(named["fc.weight"], torch.full_like(named["fc.weight"], 1 / (128 * 16)))


class _Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc((x + self.conv(x)).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ResNet(size=16, blocks=(1, 1, 1), width=4), "BatchNorm|not a plain chain"),
        (ConvNet(size=16, norm="batch"), "cannot pass BatchNorm2d"),
        (ConvNet(size=16, act="gelu"), "cannot pass GELU"),
        (ConvNet(size=16, width=2), r"carries 6 paths; convolution .* has 2 channels"),
        (CNN6(size=16), "has none"),
        (_Branched(), "not a plain chain"),
        (LeNet5(size=16, hidden=(7,)), "a row for every class"),
    ],
)
def test_models_that_cannot_carry_pixels_are_refused_with_the_reason(
    model: nn.Module, reason: str
) -> None:
    size = 8 if isinstance(model, _Branched) else 16
    with pytest.raises(UnsupportedModel, match=reason):
        plan(model, (3, size, size))


def test_outlook_passes_the_refusal_on_and_names_the_happy_case() -> None:
    view = small_stage(letter="F", settings={"norm": "batch", "width": 4}).view()
    assert MKOR().outlook(view).verdict == "hopeless"
    assert "BatchNorm2d" in MKOR().outlook(view).reason
    happy = MKOR().outlook(_stage("convnet", {"width": 8}, [0]).view())
    assert happy.verdict == "applicable" and "bounds on pixels" in happy.reason


def test_an_update_without_the_first_layer_is_named() -> None:
    attack = MKOR()
    view, records = observe(_stage(*EXACT["head only"], [1, 2]), attack)
    kept = {n: g for n, g in view.update.tensors.items() if n != "fc.weight"}
    seen = replace(view.rounds[0], update=view.update.with_tensors(kept))
    assert attack(view.with_rounds([seen], {})).reason == "the update lacks fc.weight"
    assert len(records) == 1


@pytest.mark.parametrize("kind", ["strided", "averaged"])
def test_a_saved_view_gives_the_same(kind: str, tmp_path: Path) -> None:
    attack = MKOR()
    view, _ = observe(_stage(*EXACT[kind], [1, 2]), attack)
    same_after_saving(attack, view, tmp_path)


# -- equations -------------------------------------------------------------------------------------


def test_smoothing_is_a_mean_with_gaussian_weights() -> None:
    flat = torch.full((1, 3, 6, 6), 0.3, dtype=torch.float64)
    assert torch.allclose(smooth(flat, 10.0), flat, atol=1e-12)
    spike = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    spike[0, 0, 3, 3] = 1
    line = torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64)
    weights = torch.exp(-(line[:, None] ** 2 + line[None, :] ** 2) / (2 * 1.5**2))
    assert torch.allclose(smooth(spike, 1.5)[0, 0, 1:6, 1:6], weights / weights.sum(), atol=1e-12)


def test_interpolation_is_linear_inside_and_constant_outside() -> None:
    x = torch.arange(6.0)[None, None, None, :].expand(1, 1, 2, 6)
    spoilt = x.clone()
    spoilt[..., [0, 2, 3, 5]] = 99
    known = (torch.ones(2, dtype=torch.bool), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool))
    assert interpolate(spoilt, known)[0, 0, 0].tolist() == [1, 1, 2, 3, 4, 4]


def test_lenet_at_224_would_not_be_asked_for_more_channels_than_it_has() -> None:
    layout = plan(LeNet(size=16, in_channels=1), (1, 16, 16))
    carried = [layer.paths * layer.shifts[0] * layer.shifts[1] for layer in layout.layers]
    assert max(carried) <= 12 and not layout.bounded
