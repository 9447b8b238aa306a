"""The feature FID of the shipped network: nothing between equal sets, more the more they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas import data
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidInput
from leakatlas.metrics import likeness
from leakatlas.metrics.likeness import feature_fid
from leakatlas.models import ConvNet, checkpoints
from leakatlas.priors.prior import Diffusion, empirical, linear_schedule
from tests.conftest import surrogate
from tests.priors.support import CARD, generator, prior


def _blurred(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, (side // 2,) * 4, mode="reflect"), side, stride=1)


def test_equal_sets_are_no_distance_apart_and_blur_moves_them_away() -> None:
    x = surrogate(32).images[:60]
    assert feature_fid(x, x).value == pytest.approx(0, abs=1e-6)
    assert feature_fid(x, x.flip(0)).value == pytest.approx(0, abs=1e-6)
    distances = [feature_fid(_blurred(x, side), x).value for side in (3, 5, 9)]
    assert 1e-3 < distances[0] < distances[1] < distances[2]


def test_it_is_the_closed_form_of_the_networks_pooled_features() -> None:
    x = surrogate(32).images[:40]
    x_hat = _blurred(x, 5)
    network, box = checkpoints.pretrained("convnet-cifar10"), checkpoints.card("convnet-cifar10")
    assert isinstance(network, ConvNet) and box.box is not None
    mean, std = (torch.tensor(box.box[n])[:, None, None] for n in ("mean", "std"))
    with torch.no_grad():
        a, b = (network.features((s - mean) / std).mean((2, 3)).double() for s in (x_hat, x))
    root = scipy.linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy()).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov()).trace()
    expected = float(expected) - 2 * root.trace()
    found = feature_fid(x_hat, x)
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert (found.features, found.measure) == (128, "feature FID (convnet-cifar10)")


def test_grey_and_other_sizes_are_fitted() -> None:
    x = data.digits(16).images[:30]
    assert x.shape[1] == 1
    assert feature_fid(x.expand(-1, 3, -1, -1), x).value == pytest.approx(0, abs=1e-6)
    with pytest.raises(InvalidInput, match="at least two rows"):
        feature_fid(x[:1], x)


def test_a_card_says_what_pictures_and_what_other_images_reach() -> None:
    x = surrogate(16).images
    found = likeness.of_prior(prior(generator()), x)
    half = min(likeness.IMAGES, len(x) // 2)
    assert found["feature_fid_images"] == half
    # Noise of an untrained network is far from photos; other photos are near them.
    assert found["feature_fid"] > 3 * found["feature_fid_of_other_images"] > 0
    assert likeness.of_prior(prior(generator()), x) == found
    assert likeness.of_prior(prior(generator()), x[:3]) == {}


def test_a_conditional_prior_draws_the_labels_of_the_population() -> None:
    asked: list[int] = []
    G = generator(classes=3)
    G.register_forward_pre_hook(lambda module, given: asked.extend(given[1].tolist()))
    held = replace(prior(G))
    y = torch.tensor([2, 0, 1, 1, 0, 0])
    likeness.of_prior(held, surrogate(16).images[:6], y)
    assert asked == [2, 0, 1]


def test_the_exact_denoiser_of_a_population_draws_it() -> None:
    """In the limit every picture is an image of the set, and each of them is drawn."""
    x = surrogate(16).images[:5].float()
    schedule = linear_schedule()
    exact = Diffusion(empirical(2 * x - 1, schedule), CARD, (3, 16, 16), schedule)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return likeness.denoised(exact, 60, generator=generator, watch=Watch(), batch=25)

    apart = (drawn(0)[:, None] - x).square().mean((2, 3, 4))
    assert float(apart.min(1).values.max()) < 1e-3
    assert set(apart.argmin(1).tolist()) == set(range(5))
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))


def test_a_card_of_a_denoiser_tells_its_population_from_noise() -> None:
    x = surrogate(16).images[:40].float()
    schedule = linear_schedule(40)
    shape = (3, 16, 16)
    exact = Diffusion(empirical(2 * x - 1, schedule), CARD, shape, schedule)
    blind = Diffusion(lambda noisy, t: noisy, CARD, shape, schedule)
    heard: list[float] = []
    watch = Watch(None, lambda fraction, note: heard.append(fraction))
    near, far = (likeness.of_prior(one, x, watch=watch) for one in (exact, blind))
    assert (
        near["feature_fid_images"] == len(x) // 2 and near["feature_fid"] < far["feature_fid"] / 3
    )
    assert all(0 <= fraction <= 1 for fraction in heard)
