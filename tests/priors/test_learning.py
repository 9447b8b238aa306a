"""Three recipes and their loop: what each teaches, and that a stopped training goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from leakatlas import data
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.models import Generator
from leakatlas.models.parts import seeded
from leakatlas.priors import (
    CEILING,
    Diffusion,
    Prior,
    ddpm,
    gan,
    inversion_psnr,
    learning,
    lesson,
    training,
    vae,
)
from leakatlas.priors.ddpm import Denoising
from leakatlas.priors.gan import Adversaries, Critic
from leakatlas.priors.learning import Kind
from leakatlas.priors.lesson import Draws, Lesson
from leakatlas.priors.vae import Autoencoder
from tests.priors.support import prior


def _digits(count: int = 256) -> ImageSet:
    return data.digits(8).subset(range(count))


def _draws(seed: int) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), torch.device("cpu"))


def _taught(kind: Kind, steps: int, **more: object) -> tuple[Lesson, Tensor]:
    images = _digits().images
    with seeded(0):
        taught = learning.lesson(kind, (1, 8, 8), latent=8)
        learning.teach(
            taught, images, torch.zeros(len(images), dtype=torch.int64), steps=steps,
            generator=torch.Generator().manual_seed(0), watch=Watch(), flips=False, **more,  # type: ignore[arg-type]  # passed through
        )  # fmt: skip
    return taught, images


def test_the_autoencoder_makes_latents_draw_the_images() -> None:
    images = _digits().images
    with seeded(0):
        taught = Autoencoder((1, 8, 8), 8, kl_weight=0.1)
        learning.teach(
            taught, images, torch.zeros(len(images), dtype=torch.int64), steps=120,
            generator=torch.Generator().manual_seed(0), watch=Watch(), flips=False,
        )  # fmt: skip
    found = _wrapped(taught.result())
    null = float(-10 * (images[:16] - images.mean(0)).square().flatten(1).mean(1).log10().mean())
    assert inversion_psnr(found, images[:16], steps=60, lr=0.1) > null + 2.5


def _wrapped(G: torch.nn.Module) -> Prior:
    assert isinstance(G, Generator)
    return prior(G)


def test_the_denoiser_learns_to_tell_noise_from_digits() -> None:
    before, after = (_taught("ddpm", steps)[0] for steps in (1, 60))
    images = _digits().images[:64]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    t = torch.full((64,), 300)
    errors = []
    for taught in (before, after):
        assert isinstance(taught, Denoising)
        x = ddpm.noised(2 * images - 1, noise, taught.kept[t])
        with torch.no_grad():
            errors.append(float((taught.network(x, t) - noise).square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_the_critic_tells_noise_from_digits_and_the_mean_follows_the_generator() -> None:
    taught, images = _taught("gan", 40)
    assert isinstance(taught, Adversaries)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        real, false = taught.critic(2 * images - 1, y), taught.critic(2 * noise - 1, y)
    assert float((real > false.mean()).float().mean()) > 0.95
    pairs = zip(taught.mean.parameters(), taught.generator.parameters(), strict=True)
    apart = [(a - b).norm() / b.norm() for a, b in pairs if b.dim() > 1]
    assert 0 < max(float(value.detach()) for value in apart) < 0.2


def test_a_conditional_critic_projects_on_the_label() -> None:
    with seeded(0):
        critic = Critic(channels=1, size=8, classes=3).eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    h = critic.body(x)
    assert critic.projection is not None
    y = torch.tensor([2, 0])
    expected = critic.head(h).squeeze(1) + (critic.projection(y) * h).sum(1)
    assert torch.allclose(critic(x, y), expected)
    assert not torch.allclose(critic(x, y), critic(x, 2 - y))


@pytest.mark.parametrize("kind", learning.KINDS)
def test_a_stopped_training_goes_on_as_if_it_had_not(kind: Kind, tmp_path: Path) -> None:
    file = tmp_path / "training"
    whole, _ = _taught(kind, 6)

    class Stops(Watch):
        def steps(self, total: int, **more: object):  # type: ignore[no-untyped-def]
            for step in super().steps(total, **more):  # type: ignore[arg-type]  # passed through
                yield step
                if step.index == 2:
                    return

    images = _digits().images
    labels = torch.zeros(len(images), dtype=torch.int64)
    with seeded(0):
        first = learning.lesson(kind, (1, 8, 8), latent=8)
        made = learning.teach(
            first, images, labels, steps=6, generator=torch.Generator().manual_seed(0),
            watch=Stops(), flips=False, checkpoint=file,
        )  # fmt: skip
    assert made == 3
    with seeded(5):
        second = learning.lesson(kind, (1, 8, 8), latent=8)
        learning.teach(
            second, images, labels, steps=6, generator=torch.Generator().manual_seed(7),
            watch=Watch(), flips=False, checkpoint=file,
        )  # fmt: skip
    pairs = zip(whole.result().parameters(), second.result().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_augmented_images_keep_their_shape_and_lose_a_square() -> None:
    x = torch.full((4, 3, 24, 24), 0.5)
    out = gan.augmented(x, _draws(0))
    assert out.shape == x.shape
    assert bool((out == 0).flatten(1).any(1).all())


def test_a_shift_moves_images_and_lets_zeros_in() -> None:
    """Against padding and cutting; without brightness, contrast and a hole."""
    x = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))

    class Still(Draws):
        def uniform(self, *shape: int) -> Tensor:
            return torch.full(shape, 2.0 if shape[0] == 2 else 0.5)  # the hole lies outside

        def whole(self, low: int, high: int, *shape: int) -> Tensor:
            assert (low, high) == (-2, 3)
            return torch.tensor([[1, 0, -2], [-1, 2, 0]]).reshape(shape)

    out = gan.augmented(x, Still(torch.Generator(), torch.device("cpu")))
    for image, moved, down, right in zip(x, out, (1, 0, -2), (-1, 2, 0), strict=True):
        expected = torch.zeros(2, 20, 20)
        expected[:, 2 - down : 18 - down, 2 - right : 18 - right] = image
        assert torch.allclose(moved, expected[:, 2:18, 2:18], atol=1e-6)


def test_the_terms_of_the_recipe() -> None:
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    x_hat = torch.full_like(x, 0.1)
    assert float(vae.likelihood(x, x_hat)) == pytest.approx(0.5 * 4 * -4.605170185988091)
    assert float(vae.divergence(torch.zeros(3, 5), torch.zeros(3, 5))) == 0
    # One unit of mean in each of five latents: 5/2 nats.
    assert float(vae.divergence(torch.ones(3, 5), torch.zeros(3, 5))) == pytest.approx(2.5)
    assert vae.one_cycle(0.0) == pytest.approx(1 / 25)
    assert vae.one_cycle(0.3) == pytest.approx(1.0)
    assert vae.one_cycle(1.0) == pytest.approx(0.0)


def test_noised_images_keep_unit_variance() -> None:
    draws = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 1, 50, 50, generator=draws) for _ in range(2))
    kept = torch.tensor([1.0, 0.4, 0.0])
    out = ddpm.noised(x, noise, kept)
    assert torch.equal(out[0], x[0]) and torch.equal(out[2], noise[2])
    assert float(out[1].var()) == pytest.approx(1.0, abs=0.1)


def test_odd_sizes_get_a_generator_that_covers_them() -> None:
    assert lesson.drawn_shape((3, 28, 28)) == (3, 32, 32)
    assert lesson.drawn_shape((1, 8, 8)) == (1, 8, 8)
    assert lesson.drawn_shape((3, 20, 40)) == (3, 40, 40)


# -- a prior and its card ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", learning.KINDS)
def test_a_trained_prior_says_what_it_saw_and_what_it_reaches(kind: Kind) -> None:
    found = training.train(
        _digits(80), training.Recipe(kind=kind, latent=8, steps=3), name="tiny",
        license="MIT", command="a command", watch=Watch(),
    )  # fmt: skip
    card = found.card
    first = "68 of 80 images; the next 4 to stop by," if kind == "gan" else "72 of 80 images;"
    assert card.split == f"the first {first} the last 8 held out"
    assert card.figures["steps"] == 3 and "digits" in card.data
    if isinstance(found, Diffusion):
        assert card.figures["held_out_noise_error"] > 0
    else:
        assert card.figures[CEILING] == found.ceiling
    images = data.digits(8).images
    assert bool(found.knows(images[:72]).all()) and bool(found.knows(images[:3].flip(3)).all())
    assert not bool(found.knows(images[100:150]).any())


def test_too_few_images_and_labels_that_no_recipe_takes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="population"):
        training.train(
            _digits(4), training.Recipe(), name="x", license="", command="", watch=Watch()
        )
    with pytest.raises(InvalidInput, match="only a gan"):
        training.train(
            _digits(40), training.Recipe(conditional=True, steps=1), name="x", license="",
            command="", watch=Watch(),
        )  # fmt: skip


def test_a_conditional_gan_draws_for_every_label() -> None:
    recipe = training.Recipe(kind="gan", conditional=True, latent=8, steps=2)
    found = training.train(_digits(80), recipe, name="x", license="", command="", watch=Watch())
    assert isinstance(found, Prior) and found.classes == 10
    z = torch.zeros(10, 8)
    drawn = found.decoder(torch.arange(10))(z)
    assert len(drawn.flatten(1).unique(dim=0)) == 10
