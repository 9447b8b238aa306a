"""FGLA: when features are separated exactly, when not, and what the decoder makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakatlas.attacks.generative.direct import fgla
from leakatlas.attacks.generative.direct.fgla import FGLA, Offset, separate
from leakatlas.bench import harness
from leakatlas.data import ImageSet, bundled
from leakatlas.defenses.heuristic.perturbation.clipping import Clipping
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import Stage, View
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage, surrogate

CASE = Case({"epochs": 1, "batch_size": 16, "width": 8}, {**LENET, "size": 8}, boxed=True)


def _head(B: int, K: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, distinct labels, and gradients of a linear head whose logits have that scale."""
    draws = torch.Generator().manual_seed(B)
    f = torch.rand(B, 30, generator=draws, dtype=torch.float64)
    W = (scale * torch.randn(K, 30, generator=draws, dtype=torch.float64)).requires_grad_()
    b = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    y = torch.randperm(K, generator=draws)[:B]
    loss = torch.nn.functional.cross_entropy(f @ W.T + b, y)
    g_W, g_b = torch.autograd.grad(loss, [W, b])
    return f, y, g_W, g_b


def _error(B: int, scale: float, offset: Offset) -> float:
    f, y, g_W, g_b = _head(B, 100, scale)
    found = separate(g_W, g_b, y, B, offset)
    return float((found - f).norm() / f.norm())


@pytest.mark.parametrize("offset", ["official", "full", "none"])
def test_a_single_example_is_separated_exactly_without_an_offset_of_others(offset: Offset) -> None:
    f, y, g_W, g_b = _head(1, 100, 0.0)
    assert torch.allclose(separate(g_W, g_b, y, 1, offset), f, rtol=1e-6)
    f, y, g_W, g_b = _head(1, 100, 0.5)
    if offset != "full":  # (B - 1) / B is 0; all of it would subtract the example itself
        assert torch.allclose(separate(g_W, g_b, y, 1, offset), f, rtol=1e-6)


@pytest.mark.parametrize("B", [2, 8, 64])
def test_with_a_zeroed_head_the_full_offset_is_exact(B: int) -> None:
    assert _error(B, 0.0, "full") < 1e-6
    assert _error(B, 0.0, "official") > 1e-3 / B
    assert _error(B, 0.0, "none") > 0.5 * (B - 1) / 100


def test_as_the_head_grows_every_offset_errs_and_none_most() -> None:
    small = {offset: _error(8, 0.05, offset) for offset in ("full", "official", "none")}
    assert small["full"] < small["official"] + 1e-3 < small["none"]
    assert _error(8, 0.0, "full") < small["full"] < _error(8, 2.0, "full")


def test_a_factor_on_the_gradient_cancels() -> None:
    _, y, g_W, g_b = _head(8, 100, 0.1)
    for c in (0.01, 100.0):
        scaled = separate(c * g_W, c * g_b, y, 8, "full")
        assert torch.allclose(scaled, separate(g_W, g_b, y, 8, "full"), rtol=1e-9)


def test_what_cannot_be_divided_is_0() -> None:
    _, y, g_W, g_b = _head(2, 10, 0.0)
    assert bool((separate(g_W, 0 * g_b, y, 2, "none") == 0).all())


def test_without_an_absent_class_there_is_no_offset() -> None:
    _, y, g_W, g_b = _head(10, 10, 0.1)
    assert torch.equal(separate(g_W, g_b, y, 10, "full"), separate(g_W, g_b, y, 10, "none"))


# -- the whole -----------------------------------------------------------------------------------


def _scene(
    B: int = 2, *, labels: tuple[int, ...] = (), clip: bool = False, granted: bool = False
) -> Stage:
    """Victims of the population of the public images, none of which they are."""
    given = labels or tuple(range(3, 3 + B))
    crops = bundled.patches(16, 310, part="surrogate")
    pixels = crops.images[300 : 300 + B]
    victims = ImageSet(pixels, torch.tensor(given), tuple("0123456789"), "patches")
    return build_stage(
        model="convnet",
        settings={"width": 8},
        size=16,
        letter="D",
        examples=B,
        victims=victims,
        public=crops.subset(range(300)),
        dtype=torch.float32,
        defenses=(Clipping(max_norm=0.01),) if clip else (),
        grants=frozenset({Grant.LABELS} if granted else ()),
    )


QUICK = FGLA(offset="full", epochs=15, lr=3e-3, batch_size=32, width=16)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a.clamp(0, 1) - b).square().flatten(1).mean(1).log10().mean())


def test_a_batch_is_decoded_as_its_true_features_would_be(cache: Path) -> None:
    """One image to rounding, two within a decibel, clipped as well as free; ever worse in noise."""
    del cache
    for B, tolerance in ((1, 1e-3), (2, 1.0)):
        scene = _scene(B)
        trial = harness.run_trial(scene, replace(QUICK, offset="official" if B == 1 else "full"))
        view, head = trial.view, fgla.head_of(trial.view)
        truth = trial.truth.images
        phi = fgla.features_of(view.model, scene.box.normalize(truth), head)
        shape = fgla.spatial(view.model, view.input_shape, head)
        assert shape == (32, 4, 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fgla, "separate", lambda *given, phi=phi: phi)
            ideal = scene.box.denormalize(QUICK(view).images)
        reached = _psnr(trial.images, truth)
        assert reached == pytest.approx(_psnr(ideal, truth), abs=tolerance)
        if B == 2:
            clipped = harness.run_trial(_scene(B, clip=True), QUICK)
            assert _psnr(clipped.images, truth) == pytest.approx(reached, abs=0.05)
            public = view.surrogate.images
            held, mean = public[270:], public[:270].mean(0, keepdim=True)
            assert trial.found.notes["held_out_psnr"] > _psnr(mean.expand_as(held), held) + 3
            told, _ = harness.observe(_scene(B, granted=True), QUICK)
            noised = [scene.box.denormalize(QUICK(_noised(told, s)).images) for s in NOISES]
            reached_under = [_psnr(images, truth) for images in (trial.images, *noised)]
            assert reached_under == sorted(reached_under, reverse=True)
            assert reached_under[-1] < reached - 3


NOISES = (0.1, 1.0, 10.0)


def _noised(view: View, share: float) -> View:
    """The same round, with noise of that share of every tensor's own root mean square."""
    draws, seen = torch.Generator().manual_seed(0), view.rounds[0]
    assert seen.update is not None
    noise = {
        n: share * t.square().mean().sqrt() * torch.randn(t.shape, generator=draws)
        for n, t in seen.update.tensors.items()
    }
    tensors = {n: t + noise[n] for n, t in seen.update.tensors.items()}
    return view.with_rounds([replace(seen, update=seen.update.with_tensors(tensors))], {})


def test_noise_on_the_gradient_costs_features_ever_more() -> None:
    f, y, g_W, g_b = _head(8, 100, 0.05)
    draws = torch.Generator().manual_seed(0)
    noise_W, noise_b = (torch.randn(g.shape, generator=draws, dtype=g.dtype) for g in (g_W, g_b))
    errors = [
        float((separate(g_W + s * noise_W, g_b + s * noise_b, y, 8, "full") - f).norm())
        for s in (0.0, 1e-3, 1e-2, 1e-1)
    ]
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0]


def test_repeated_labels_give_one_mixed_feature_for_each_class(cache: Path) -> None:
    del cache
    scene = _scene(3, labels=(5, 5, 7))
    found = harness.run_trial(scene, replace(QUICK, epochs=1)).found
    assert found.labels is not None and found.labels.tolist() == [5, 7]
    assert found.notes["mixed_features"] == 1


def test_heads_that_it_cannot_read_are_refused() -> None:
    scene = build_stage(
        letter="D", settings={"widths": (8,), "act": "relu", "bias": False}, public=surrogate(8)
    )
    view, _ = harness.observe(scene, QUICK)
    assert QUICK.outlook(view).verdict == "hopeless"
    with pytest.raises(UnsupportedModel, match="divides rows"):
        QUICK(view)


def test_the_outlook_knows_pooling_and_crowds() -> None:
    scene = build_stage(
        model="resnet8", settings={"width": 4}, letter="D", public=surrogate(8),
        grants=frozenset({Grant.LABELS}),
    )  # fmt: skip
    view, _ = harness.observe(scene, QUICK)
    assert "texture" in QUICK.outlook(view).reason
    view, _ = harness.observe(_scene(), QUICK)
    assert "exact features" in QUICK.outlook(view).reason


def test_the_defaults_are_the_published_ones() -> None:
    attack = FGLA()
    assert (attack.offset, attack.epochs, attack.lr) == ("official", 30, 1e-4)
