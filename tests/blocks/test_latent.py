"""Searches inside a generator: what each may touch, and how pixels are fitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leakatlas.blocks import descent, latent
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box
from leakatlas.errors import InvalidInput
from leakatlas.models import Generator
from tests.conftest import BOX, photos
from tests.priors.support import SIZE, generator


def _searched() -> tuple[Generator, Tensor, Tensor, descent.Descended, list[float]]:
    G = generator()
    draws = torch.Generator().manual_seed(1)
    z = torch.randn(2, 12, generator=draws)
    target = photos(2, SIZE).images
    history: list[float] = []

    def value(pixels: Tensor) -> descent.Value:
        D = (pixels - target).square().mean()
        history.append(float(D.detach()))
        return descent.Value(D, D)

    kept = z.clone()
    found = latent.search_weights(G, (z,), value, steps=15, lr=1e-2, watch=Watch())
    return G, z, kept, found, history


def test_the_second_search_leaves_latents_andgenerator_bit_for_bit() -> None:
    reference = {n: p.clone() for n, p in generator().named_parameters()}
    G, z, kept, _, _ = _searched()
    assert torch.equal(z, kept)
    assert all(torch.equal(p, reference[n]) for n, p in G.named_parameters())


def test_the_copies_part_from_each_other_and_from_the_original() -> None:
    G, _, _, found, history = _searched()
    named = dict(G.named_parameters())
    moved = {n: (stack[0] - stack[1]).abs().max() for n, stack in found.best.items()}
    assert moved.keys() == named.keys()
    assert all(float(distance) > 0 for distance in moved.values())
    assert all(not torch.equal(stack[0], named[n]) for n, stack in found.best.items())
    assert float(found.criterion) == pytest.approx(min(history))
    assert min(history) < 0.8 * history[0]


def test_the_copies_start_as_thegenerator_and_draw_what_it_draws() -> None:
    G = generator()
    z = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(latent.drawn(G, latent.copies(G, 3), (z,)), G(z), atol=1e-6)


def test_each_image_is_drawn_by_its_own_copy() -> None:
    first, second = generator(0), generator(1)
    z = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))
    named = dict(second.named_parameters())
    stacks = {n: torch.stack([p, named[n]]) for n, p in first.named_parameters()}
    drawn = latent.drawn(first, stacks, (z,))
    assert torch.allclose(drawn[:1], first(z[:1]), atol=1e-6)
    assert torch.allclose(drawn[1:], second(z[1:]), atol=1e-6)


def test_restarts_are_searched_independently_and_ranked_by_their_own_criterion() -> None:
    G = generator()
    starts = torch.randn(3, 1, 12, generator=torch.Generator().manual_seed(3))
    target = photos(1, SIZE).images

    def value(pixels: Tensor) -> descent.Value:
        D = (pixels - target).square().mean()
        return descent.Value(D, D)

    def search(start: Tensor) -> descent.Descended:
        return latent.search_latent(G, start, value, steps=10, lr=0.1, watch=Watch())

    together = search(starts)
    for r in range(3):
        alone = search(starts[r : r + 1])
        assert torch.allclose(together.best["z"][r], alone.best["z"][0], atol=1e-5)
        assert float(together.criterion[r]) == pytest.approx(float(alone.criterion), rel=1e-4)


def test_the_latent_weight_pulls_latents_to_the_origin() -> None:
    G = generator()
    start = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3))

    def value(pixels: Tensor) -> descent.Value:
        return descent.Value(pixels.sum() * 0, pixels.square().mean())

    found = latent.search_latent(G, start, value, steps=20, lr=0.1, weight=1.0, watch=Watch())
    assert found.last["z"].norm() < 0.5 * start.norm()


def test_pixels_become_model_inputs_of_the_clients_size_and_channels() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    unit3, unit1 = Box.unit(3), Box.unit(1)
    assert torch.equal(latent.to_model_space((3, 8, 8), BOX)(pixels), BOX.normalize(pixels))
    halved = latent.to_model_space((3, 4, 4), unit3)(pixels)
    assert torch.allclose(halved, torch.nn.functional.avg_pool2d(pixels, 2))
    grey = latent.to_model_space((1, 8, 8), unit1)(pixels)
    assert torch.allclose(grey, pixels.mean(1, keepdim=True))
    assert latent.to_model_space((3, 12, 12), unit3)(pixels).shape == (2, 3, 12, 12)
    colours = latent.to_model_space((3, 8, 8), unit3)(pixels[:, :1])
    assert torch.equal(colours, pixels[:, :1].expand(-1, 3, -1, -1))


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"draws images.*\(7,\)"):
        latent.to_model_space((7,), BOX)
