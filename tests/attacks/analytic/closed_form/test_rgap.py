from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.analytic.closed_form.rgap import (
    LOWEST_PRODUCT,
    RGAP,
    affine_layers,
    back,
    gradient_constraints,
    inverse_of,
    logistic_roots,
    rank_analysis,
    softmax_roots,
    solve_convolution,
)
from leakatlas.bench.harness import Trial, observe, run_trial
from leakatlas.data import ImageSet
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, Stage, View
from leakatlas.models import build
from tests.attacks.analytic.support import crops, errors, psnr, same_after_saving, small_stage
from tests.attacks.case import Case
from tests.conftest import BOX

CASE = Case(
    {},
    {"settings": {"widths": (220,), "act": "leaky_relu", "bias": False}, "examples": 1},
)


def _one(label: int = 1, size: int = 16, index: int = 0) -> ImageSet:
    names = tuple(str(c) for c in range(10))
    return ImageSet(crops(size, index + 1).images[index:], torch.tensor([label]), names, "one crop")


def _stage(model: str = "cnn6", size: int = 16, label: int = 1, **more: Any) -> Stage:
    settings = more.pop("settings", {"head_bias": True})
    return small_stage(
        letter="B", model=model, settings=settings, size=size, victims=_one(label, size), **more
    )


def test_above_sixty_decibels_on_its_network() -> None:
    """CNN6 at 32x32 with the biased head of ten classes."""
    trial = run_trial(_stage(size=32), RGAP())
    assert trial.found.status == "complete" and trial.found.labels is not None
    assert trial.found.labels.tolist() == [1]
    assert float(psnr(trial)[0]) > 60
    assert all(v == 1 for n, v in trial.found.notes.items() if n.startswith("rank_share"))


@pytest.mark.parametrize("label", [0, 1])
def test_two_logits_without_bias_find_their_own_scale(label: int) -> None:
    """The logistic start inside the protocol: K = 2, no bias, label unknown."""
    trial = run_trial(_stage(settings={"classes": 2}, label=label), RGAP())
    assert float(psnr(trial)[0]) > 60
    assert trial.found.labels is not None and trial.found.labels.tolist() == [label]


def test_ten_logits_without_bias_find_their_own_scale() -> None:
    trial = run_trial(_stage(settings={"head_bias": False}, label=7), RGAP())
    assert float(psnr(trial)[0]) > 60
    assert trial.found.labels is not None and trial.found.labels.tolist() == [7]


def _logistic_view(model: nn.Module, image: Tensor, y: int, size: int) -> View:
    """A view of a model with one logit, whose client used the logistic loss."""
    stage = small_stage(
        letter="B", model="cnn6", settings={"classes": 1}, live=model, size=size,
        victims=_one(0, size),
    )  # fmt: skip
    view, _ = observe(stage, RGAP())
    loss = F.softplus(-y * model(image)).mean()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    seen = view.rounds[0]
    assert seen.update is not None
    update = seen.update.with_tensors(dict(zip(named, gradients, strict=True)))
    return view.with_rounds([replace(seen, update=update)], {})


@pytest.mark.parametrize("y", [1, -1])
def test_one_logit_with_the_logistic_loss(y: int) -> None:
    """The paper's own head: both labels and both roots are tried, the right ones win."""
    model = build("cnn6", classes=1, size=16).double()
    image = _one(size=16).images.double()
    found = RGAP()(_logistic_view(model, image, y, 16))
    assert found.labels is not None and found.labels.tolist() == [int(y > 0)]
    assert float((found.images - image).square().mean().sqrt()) < 1e-3


def test_the_linear_network_is_exact() -> None:
    trial = run_trial(_stage(settings={"head_bias": True, "act": "identity"}), RGAP())
    assert float(errors(trial)[0]) < 1e-8


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "elu", "softplus"])
def test_other_invertible_activations(act: str) -> None:
    trial = run_trial(_stage(settings={"head_bias": True, "act": act}, box=BOX), RGAP())
    assert float(psnr(trial)[0]) > 40


def test_too_few_channels_lose_the_image_and_the_attack_says_so() -> None:
    """CNN6-d's defect at 16x16: fewer channels after the second convolution."""
    narrow = run_trial(_stage(settings={"head_bias": True, "second": 8}), RGAP())
    full = run_trial(_stage(), RGAP())
    assert narrow.found.status == "failed" and "determines only" in narrow.found.reason
    assert float(psnr(narrow)[0]) < 25 < 60 < float(psnr(full)[0])


def _toy(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(12 * 36, 10),
    )  # fmt: skip


@pytest.mark.parametrize("channels", [2, 4, 6, 8, 12])
def test_exact_if_and_only_if_full_rank(channels: int) -> None:
    stage = small_stage(
        letter="B", size=12, live=_toy(channels), victims=_one(size=12), model="fc", settings={}
    )
    trial = run_trial(stage, RGAP())
    model = stage.federation.model
    ranks = rank_analysis(model, torch.rand(1, 3, 12, 12), torch.tensor([3]))
    full = all(layer.rank == layer.length for layer in ranks)
    assert full == (float(errors(trial)[0]) < 1e-6)
    assert full == (trial.found.status == "complete")


def test_a_wider_layer_never_has_a_lower_rank() -> None:
    found = []
    for channels in (2, 4, 6, 8):
        model = _toy(channels)
        first = rank_analysis(model, torch.rand(1, 3, 12, 12), torch.tensor([0]))[0]
        assert first.length == 432
        found.append(first.rank)
    assert found == sorted(found) and found[0] < 432 == found[-1]


def test_the_ratio_of_a_first_linear_layer_is_exact_whatever_stands_behind() -> None:
    """One example, FC layer with bias: 1e-6 and far better, with a ReLU that cannot be undone."""
    stage = _stage("fc", settings={"widths": (40, 20), "act": "relu"}, box=BOX)
    trial = run_trial(stage, RGAP())
    assert float(errors(trial)[0]) < 1e-6 and trial.found.status == "complete"


def test_fully_connected_without_bias() -> None:
    stage = _stage(
        "fc", size=8, settings={"widths": (200, 100), "act": "leaky_relu", "bias": False}
    )
    assert float(errors(run_trial(stage, RGAP()))[0]) < 1e-6


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("cnn6", {"act": "relu", "head_bias": True}, "ReLU"),
        ("convnet", {"width": 4}, "MaxPool2d|ReLU"),
        ("resnet8", {}, "plain chain"),
        ("vit", {}, "plain chain|LayerNorm"),
    ],
)
def test_what_cannot_be_undone_is_refused(
    model: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        run_trial(_stage(model, settings=settings), RGAP())


def test_normalisation_before_the_start_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.LayerNorm([4, 6, 6]), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(144, 10),
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="LayerNorm"):
        run_trial(_stage("fc", size=8, live=model, settings={}), RGAP())


def test_a_batch_is_refused() -> None:
    stage = small_stage(letter="B", model="cnn6", settings={}, size=16, examples=2)
    trial = run_trial(stage, RGAP())
    assert (
        trial.found.status == "failed" and "one example; the update holds 2" in trial.found.reason
    )


def test_an_empty_gradient_is_reported() -> None:
    view, _ = observe(_stage(), RGAP())
    seen = view.rounds[0]
    assert seen.update is not None
    zero = seen.update.with_tensors({n: t * 0 for n, t in seen.update.tensors.items()})
    found = RGAP()(view.with_rounds([replace(seen, update=zero)], {}))
    assert found.status == "failed" and "zero" in found.reason


def test_noise_is_reported_as_contradiction() -> None:
    view, _ = observe(_stage(), RGAP())
    seen = view.rounds[0]
    assert seen.update is not None
    generator = torch.Generator().manual_seed(0)
    noisy = {
        n: t + 0.1 * t.abs().mean() * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for n, t in seen.update.tensors.items()
    }
    found = RGAP()(view.with_rounds([replace(seen, update=seen.update.with_tensors(noisy))], {}))
    assert found.status == "failed" and "contradict" in found.reason


def test_one_local_step_is_a_gradient_and_several_drift() -> None:
    def error(epochs: int) -> float:
        stage = small_stage(
            letter="C", model="cnn6", settings={"head_bias": True}, size=16, victims=_one(),
            protocol=FedAVG(epochs=epochs, lr=0.1),
        )  # fmt: skip
        return float(errors(run_trial(stage, RGAP()))[0])

    assert error(1) < 1e-3 < error(5)


@pytest.mark.parametrize("product", [-0.278, -0.2, -0.05, -1e-6, 0.0, 0.3, 2.0, 30.0])
def test_logistic_roots_agree_with_bisection(product: float) -> None:
    def excess(mu: float) -> float:
        return -mu / (1 + math.exp(min(mu, 700))) - product

    roots = logistic_roots(product)
    if product >= 0:
        assert len(roots) == 1 and roots[0] <= 0
        expected = [brentq(excess, -60, 1.278)]
    else:
        assert len(roots) == 2
        expected = [brentq(excess, -60, 1.2784645), brentq(excess, 1.2784645, 60)]
    assert sorted(roots) == pytest.approx(expected, abs=1e-6)


def test_no_root_below_the_minimum() -> None:
    assert logistic_roots(LOWEST_PRODUCT - 1e-3) == ()
    mu = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    assert float((-mu / (1 + mu.exp())).min()) == pytest.approx(LOWEST_PRODUCT, abs=1e-9)


def test_softmax_roots_hold_the_true_one() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 20, generator=generator, dtype=torch.float64) / 5
    x = torch.randn(20, generator=generator, dtype=torch.float64)
    k = torch.softmax(weight @ x, 0)
    k[4] -= 1
    roots = softmax_roots(torch.outer(k, x), weight)
    close = [r for r in roots if r[1] == 4 and torch.allclose(r[0], k, atol=1e-9)]
    assert len(close) == 1 and close[0][2] < 1e-9


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (4, 2, 2, 1), (3, 2, 0, 2)]
)
def test_constraints_are_autograds(kernel: int, stride: int, padding: int, dilation: int) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(
        2, 3, kernel, stride=stride, padding=padding, dilation=dilation, bias=False
    ).double()
    x = torch.rand(1, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    z = conv(x)
    k = torch.randn_like(z)
    g_w, g_x = torch.autograd.grad((z * k).sum(), [conv.weight, x])
    matrix = gradient_constraints(conv, (2, 9, 9), k.flatten())
    by_hand = (x[0].detach().flatten(1) @ matrix.T).reshape(2, 3, kernel, kernel)
    assert torch.allclose(by_hand.permute(1, 0, 2, 3), g_w)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(z.numel(), 2)).double()
    layer = affine_layers(model, x.detach())[0]
    assert torch.allclose(back(layer, k.flatten(), {"0.weight": conv.weight}), g_x.flatten())


def test_one_convolution_agrees_with_the_dense_stacked_system() -> None:
    """The paper's system, written out naively with its padding constraints."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False).double()
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    z = conv(x)
    k = torch.randn_like(z)
    g_w = torch.autograd.grad((z * k).sum(), conv.weight)[0]
    padded = F.pad(x, (1, 1, 1, 1)).flatten()
    n = len(padded)
    basis = torch.eye(n, dtype=torch.float64).reshape(n, 2, 8, 8)
    outputs = F.conv2d(basis, conv.weight.detach(), stride=2)
    weights = outputs.reshape(n, -1).T
    gradients = torch.stack(
        [
            torch.autograd.grad(
                (F.conv2d(b[None], w := conv.weight.detach().requires_grad_(), stride=2) * k).sum(),
                w,
            )[0].flatten()
            for b in basis
        ],
        dim=1,
    )
    border = F.pad(torch.zeros(2, 6, 6), (1, 1, 1, 1), value=1.0).flatten().bool()
    padding = torch.eye(n, dtype=torch.float64)[border]
    a = torch.cat([gradients, weights, padding])
    b = torch.cat([g_w.flatten(), z.detach().flatten(), torch.zeros(int(border.sum()))])
    dense = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
    ours = solve_convolution(conv, (2, 6, 6), k.flatten(), g_w, z.detach().flatten())
    assert torch.allclose(ours.x.flatten(), dense[~border], atol=1e-9)
    assert torch.allclose(ours.x.flatten(), x.flatten(), atol=1e-9) and ours.full_rank


@pytest.mark.parametrize(
    "module", [nn.LeakyReLU(0.2), nn.Tanh(), nn.Sigmoid(), nn.ELU(), nn.Softplus()]
)
def test_inverses_and_slopes(module: nn.Module) -> None:
    inverse, slope = inverse_of(module)
    z = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    a = module(z)
    derivative = torch.autograd.grad(a.sum(), z)[0]
    assert torch.allclose(inverse(a.detach()), z.detach(), atol=1e-9)
    assert torch.allclose(slope(z.detach()), derivative)


def test_float32_updates_lose_accuracy_but_not_the_picture() -> None:
    trial = run_trial(_stage(dtype=torch.float32), RGAP())
    assert 20 < float(psnr(trial)[0]) < 130
    assert trial.found.images.dtype == torch.float32


def _labels(trial: Trial) -> list[int]:
    assert trial.found.labels is not None
    return trial.found.labels.tolist()


def test_the_label_is_the_one_negative_bias_gradient() -> None:
    assert [_labels(run_trial(_stage(label=y), RGAP())) for y in (0, 9)] == [[0], [9]]


def test_the_same_from_a_saved_view(tmp_path: Path) -> None:
    attack = RGAP()
    view, _ = observe(_stage(), attack)
    same_after_saving(attack, view, tmp_path)
