"""GGDM: sampling, guidance, and the exact denoiser that needs no training."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, softplus

from leakatlas.attacks.generative.latent import ggdm
from leakatlas.attacks.generative.latent.ggdm import GGDM
from leakatlas.bench import harness
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet, bundled
from leakatlas.fl import Stage
from leakatlas.priors import Diffusion
from leakatlas.priors.prior import empirical, linear_schedule
from leakatlas.threat import Grant
from tests.attacks.case import LENET, Case
from tests.conftest import build_stage
from tests.priors.support import CARD

CASE = Case(
    {"steps": 3, "samples": 1, "prior": "images"}, {**LENET, "size": 8, "examples": 1}, boxed=True
)

SIZE, COUNT = 16, 24

Network = tuple[str, dict[str, Any]]
SMOOTH: Network = ("lenet", {"width": 12})
SMOOTH_CONVNET: Network = ("convnet", {"width": 8, "act": "sigmoid"})
RELU_CONVNET: Network = ("convnet", {"width": 8})


@functools.cache
def _images() -> Tensor:
    return 2 * bundled.patches(SIZE, COUNT).images.double() - 1


def _exact() -> Diffusion:
    kept = linear_schedule()
    return Diffusion(empirical(_images(), kept), CARD, (3, SIZE, SIZE), kept)


def _scene(index: int, network: Network = SMOOTH) -> Stage:
    model, settings = network
    pixels = ((_images()[index : index + 1] + 1) / 2).float()
    victims = ImageSet(pixels, torch.tensor([3]), tuple("0123456789"), "one of them")
    return build_stage(
        model=model, settings=settings, size=SIZE, letter="D", examples=1, victims=victims,
        grants=frozenset({Grant.LABELS}), public=bundled.patches(SIZE, 20, part="surrogate"),
    )  # fmt: skip


def _nearest(x: Tensor) -> int:
    return int((x - _images()).square().flatten(1).sum(1).argmin())


def _sampled(
    attack: GGDM, index: int, seed: int, network: Network = SMOOTH
) -> tuple[Tensor, float]:
    scene = _scene(index, network)
    view, _ = harness.observe(scene, attack)
    replay, g = view.replayer(), dict(view.update.tensors)
    y = torch.tensor([3])

    def apart(x: Tensor) -> Tensor:
        trial = replay(scene.box.normalize((x + 1) / 2), y)
        return (
            torch.stack([(trial[n] - g[n]).square().sum() for n in g]).sum().clamp_min(1e-30).sqrt()
        )

    draws = torch.Generator().manual_seed(seed)
    start = torch.randn(1, 3, SIZE, SIZE, generator=draws, dtype=torch.float64)
    x, _ = attack.sample(_exact(), start, apart, draws, Watch())
    return x, float(apart(x).detach())


VICTIMS = range(8)
"""Crops of eight photos; each comes twice more among the images, from other places."""


def _hits(attack: GGDM, network: Network = SMOOTH) -> tuple[int, float]:
    """Victims that are found, each above 30 dB; and the mean distance at which sampling ended."""
    hits, losses = 0, []
    for seed, index in enumerate(VICTIMS):
        x, loss = _sampled(attack, index, seed, network)
        losses.append(loss)
        if _nearest(x) == index:
            hits += 1
            error = (x - _images()[index]).square().mean() / 4
            assert float(-10 * error.log10()) > 30
    return hits, sum(losses) / len(losses)


@functools.cache
def _unguided() -> tuple[int, float]:
    return _hits(GGDM(steps=100, guidance=0.0))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guided_by_the_gradient_the_exact_denoiser_gives_every_victim(guidance: float) -> None:
    found, distance = _hits(GGDM(steps=100, guidance=guidance))
    blind, without = _unguided()
    assert found == len(VICTIMS) and blind == 0
    assert distance < 0.1 * without


def test_at_the_noisy_image_itself_smooth_networks_guide_and_kinks_do_not() -> None:
    """Eight of eight on a ConvNet of sigmoids, most on DLG's LeNet; next to none through ReLUs.

    Why: :func:`test_the_slope_at_the_noisy_image_misses_how_masks_move`.
    """
    attack = GGDM(steps=100, guidance=3.0, wrt="xt")
    found, distance = _hits(attack, SMOOTH_CONVNET)
    assert found == len(VICTIMS)
    assert distance < 1e-3
    assert _hits(attack, SMOOTH)[0] >= 5
    assert _hits(attack, RELU_CONVNET)[0] <= 2


def _cosine_to_the_victim(sharpness: float, *, own_masks: bool = False) -> float:
    """Of the guiding step at x_t, t = 800 of 1,000, with the way from the mean image; 8 victims.

    Three convolutions under softplus, which a sharpness of infinity makes ReLU; with ``own_masks``
    every ReLU keeps the mask that the victim itself sets.
    """
    images, kept = _images(), float(linear_schedule()[800])
    found = []
    for victim in VICTIMS:
        x0 = images[victim : victim + 1]
        draws = torch.Generator().manual_seed(victim)
        layers = [
            0.3 * torch.randn(shape, generator=draws, dtype=torch.float64)
            for shape in ((8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3), (10, 16 * 16))
        ]
        weights = [w.div_(w[0].numel() ** 0.5 * 0.3).requires_grad_() for w in layers]
        masks: list[Tensor] = []

        def bend(h: Tensor, place: int, masks: list[Tensor] = masks) -> Tensor:
            if own_masks:
                if len(masks) <= place:
                    masks.append((h > 0).detach())
                return h * masks[place]
            return h.relu() if math.isinf(sharpness) else softplus(h, sharpness, 1e9)

        def update(x: Tensor, weights: list[Tensor] = weights, bend: Any = bend) -> list[Tensor]:
            for place, stride in enumerate((1, 2, 2)):
                x = bend(conv2d(x, weights[place], padding=1, stride=stride), place)
            loss = cross_entropy(x.flatten(1) @ weights[-1].T, torch.tensor([3]))
            return list(torch.autograd.grad(loss, weights, create_graph=True))

        g = [t.detach() for t in update(x0)]
        noise = torch.randn(x0.shape, generator=draws, dtype=torch.float64)
        x = (math.sqrt(kept) * x0 + math.sqrt(1 - kept) * noise).requires_grad_()
        apart = torch.stack([(a - b).square().sum() for a, b in zip(update(x), g, strict=True)])
        (slope,) = torch.autograd.grad(apart.sum().sqrt(), x)
        way = x0 - images.mean(0, keepdim=True)
        found.append(float(-(slope * way).sum() / slope.norm() / way.norm()))
    return sum(found) / len(found)


def test_the_slope_at_the_noisy_image_misses_how_masks_move() -> None:
    """Sharper kinks guide ever less; the image's own masks, which nobody has, bring it back."""
    soft, sharp, kinked = (_cosine_to_the_victim(s) for s in (1.0, 3.0, math.inf))
    assert soft > sharp > kinked
    assert _cosine_to_the_victim(math.inf, own_masks=True) > 2 * kinked


def test_unguided_it_samples_some_of_its_images() -> None:
    x, _ = _sampled(GGDM(steps=100, guidance=0.0), 0, 0)
    assert float((x - _images()).square().flatten(1).sum(1).min()) < 1e-2


def test_without_guidance_it_is_plain_sampling_bit_for_bit() -> None:
    """Against the textbook recursion, with the same draws."""
    prior, attack = _exact(), GGDM(steps=20, guidance=0.0)

    def forbidden(x: Tensor) -> Tensor:
        raise AssertionError("the update was looked at")

    draws = torch.Generator().manual_seed(4)
    start = torch.randn(1, 3, SIZE, SIZE, generator=draws, dtype=torch.float64)
    found, made = attack.sample(prior, start, forbidden, draws, Watch())
    assert made == 20
    draws = torch.Generator().manual_seed(4)
    x = torch.randn(1, 3, SIZE, SIZE, generator=draws, dtype=torch.float64)
    times = [round(999 * (1 - i / 20)) for i in range(20)] + [-1]
    for t, then in itertools.pairwise(times):
        a = float(prior.kept[t])
        b = float(prior.kept[then]) if then >= 0 else 1.0
        noise = prior.noise(x, t)
        clean = ((x - math.sqrt(1 - a) * noise) / math.sqrt(a)).clamp(-1, 1)
        sigma = 1.0 * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        fresh = torch.randn(x.shape, generator=draws).to(x)
        x = math.sqrt(b) * clean + sigma * fresh
        x = x + math.sqrt(max(1 - b - sigma**2, 0.0)) * noise
    assert torch.equal(found, x)


def test_the_exact_denoiser_knows_its_images() -> None:
    prior = _exact()
    noise = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    kept = float(prior.kept[100])
    x = math.sqrt(kept) * _images()[2:3] + math.sqrt(1 - kept) * noise
    assert torch.allclose(prior.noise(x, 100), noise, atol=1e-6)
    blurred = (x - prior.noise(x, 999)) / 1  # of pure noise it says little about any
    assert torch.isfinite(blurred).all()


def test_a_variance_that_is_predicted_too_is_left_out() -> None:
    two = Diffusion(lambda x, t: torch.cat([x, 7 * x], 1), CARD, (3, SIZE, SIZE), linear_schedule())
    x = torch.ones(1, 3, SIZE, SIZE)
    assert torch.equal(two.noise(x, 3), x)


def test_the_schedule_is_the_linear_one() -> None:
    kept = linear_schedule()
    assert len(kept) == 1000 and float(kept[0]) == pytest.approx(1 - 1e-4)
    assert float(kept[-1]) == pytest.approx(4e-5, rel=0.05)


def test_more_samples_never_end_further_away() -> None:
    scene = _scene(1)
    attack = GGDM(steps=8, samples=1, prior="images", wrt="xt")
    view, _ = harness.observe(scene, attack)
    one, three = attack(view), replace(attack, samples=3)(view)
    assert three.notes["matching_loss"] <= one.notes["matching_loss"]
    assert ggdm.UNIT == 0.1 and "surrogate" in one.reads


def test_without_images_and_without_a_model_it_is_hopeless() -> None:
    view, _ = harness.observe(build_stage(letter="D"), GGDM())
    assert GGDM().outlook(view).verdict == "hopeless"


def test_the_shipped_model_is_taken_for_its_shape_and_named() -> None:
    view, _ = harness.observe(build_stage(letter="D", size=32), GGDM())
    assert "the diffusion model ddpm32-s" in GGDM().outlook(view).reason
    learned = replace(GGDM(), prior="surrogate")
    assert "ddpm32-s" not in learned.outlook(view).reason
