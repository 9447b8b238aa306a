"""Which prior an attack takes: a shipped one, a user's own, or one learned on its surrogate images.

``auto`` takes the shipped prior of the client's shape, if there is one that speaks of images like
the surrogate's, and otherwise learns a decoder (:mod:`leakatlas.priors.learning`) from them, once:
what was learned is cached and shared by all attacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from leakatlas import models
from leakatlas.attacks.api import Outlook, learned
from leakatlas.blocks.watch import Watch
from leakatlas.data import ImageSet
from leakatlas.errors import InvalidParameter
from leakatlas.fl import View
from leakatlas.models import Card, Denoiser, Generator
from leakatlas.priors import Diffusion, Prior, inversion_psnr, kept, training
from leakatlas.priors.lesson import drawn_shape, widths
from leakatlas.priors.prior import empirical, linear_schedule

AUTO = "auto"
SURROGATE = "surrogate"

SHIPPED: Mapping[tuple[int, ...], str] = {(3, 32, 32): "generator-cifar10"}
"""The shipped decoder for inputs of a shape."""

LEARNING = 0.4
"""Share of a time budget that learning a prior may take; the rest is for the search."""

PROBED, PROBE_STEPS = 16, 150
"""Surrogate images, and steps on each, by which it is judged whether a prior speaks of them."""

FOREIGN = 3.0
"""Decibels by which a prior draws images worse than its own held-out ones if they are of another
kind."""

FEWEST = 128
"""Public images below which a shipped prior of another kind is better than what they teach."""


def named(prior: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The kept priors that an attack with this parameter may use on inputs ``(C, H, W)``."""
    if prior == SURROGATE:
        return ()
    if prior == AUTO:
        return (SHIPPED[shape],) if shape in SHIPPED else ()
    return (prior,)


def prior_of(prior: str, view: View, *, steps: int, latent: int = 128, watch: Watch) -> Prior:
    """The prior that an attack searches, frozen, on the device and in the dtype of the update.

    Args:
        prior: ``auto``, ``surrogate``, the name of a shipped prior, or a folder.
        view: The adversary's side.
        steps: Of learning one.
        latent: Length of the latent of one that is learned.
        watch: Budget and progress; learning takes a part of it.

    Raises:
        InvalidInput: If there is no such prior, or it has no latents.
        InvalidParameter: If its labels are not the model's.
    """
    like = next(iter(view.update.tensors.values()))
    if prior == AUTO:
        prior = _chosen(view, watch)
    if prior == SURROGATE:
        made = taught(view.surrogate, steps=steps, latent=latent, watch=watch)
    else:
        made = kept.decoder(prior)
    if made.classes and made.classes != view.classes:
        raise InvalidParameter(
            f"The prior {prior!r} is conditioned on {made.classes} labels, the model has "
            f"{view.classes}; take an unconditional one."
        )
    return made.at(like)


IMAGES = "images"
"""The exact denoiser of the surrogate images."""

DENOISERS: Mapping[tuple[int, ...], str] = {(3, 32, 32): "ddpm32-s"}
"""The shipped diffusion model for inputs of a shape."""


def named_diffusion(prior: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """As :func:`named`, for an attack that guides a diffusion model."""
    if prior in (SURROGATE, IMAGES):
        return ()
    if prior == AUTO:
        return tuple(n for n in (DENOISERS.get(shape),) if n in kept.shipped())
    return (prior,)


def diffusion_of(prior: str, view: View, *, steps: int, watch: Watch) -> Diffusion:
    """The diffusion model that an attack guides, on the device and in the dtype of the update.

    Args:
        prior: ``auto``, ``surrogate`` (learned), ``images`` (exact, of the surrogate images
            themselves), the name of a shipped one, or a folder.
        view: The adversary's side.
        steps: Of learning one.
        watch: Budget and progress; learning takes a part of it.

    Raises:
        InvalidInput: If there is no such prior, or it is no diffusion model.
    """
    like = next(iter(view.update.tensors.values()))
    names = named_diffusion(prior, tuple(view.input_shape))
    if prior == IMAGES:
        images = view.surrogate.images
        shares = linear_schedule()
        channels, height, width = view.surrogate.shape
        return Diffusion(
            empirical(2 * images - 1, shares), _card(view.surrogate.name, {}),
            (channels, height, width), shares,
        )  # fmt: skip
    if names:
        found = kept.diffusion(names[0])
    else:
        found = _taught_diffusion(view.surrogate, steps=steps, watch=watch)
    if isinstance(found.network, nn.Module):
        found.network.to(like).eval().requires_grad_(False)
    return found


def _taught_diffusion(images: ImageSet, *, steps: int, watch: Watch) -> Diffusion:
    shape = drawn_shape(images.shape)
    recipe = training.Recipe(kind="ddpm", size=shape[1], steps=steps)

    def learn(generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        del generator  # the recipe has a seed of its own
        share = next(watch.share((LEARNING, 1 - LEARNING)))
        made = training.train(
            images.to(torch.device("cpu")), recipe, name=SURROGATE, license="", command="",
            watch=share, measure=False,
        )  # fmt: skip
        assert isinstance(made.network, Denoiser)
        return dict(made.network.state_dict())

    found = learned("denoiser", [images.fingerprint(), steps, 1], learn, watch=watch)
    network = Denoiser(channels=shape[0], size=shape[1])
    models.apply_state(network, found, source="the learned denoiser")
    made = kept.wrapped(network, _card(images.name, {}))
    assert isinstance(made, Diffusion)
    return made


def _card(data: str, figures: dict[str, float]) -> Card:
    """Of a prior that was learned here."""
    return Card(
        name=SURROGATE, model="generator", settings={}, box=None, data=data, split="", recipe="",
        seed=0, epochs=0, figures=figures, date="", license="", sha256="",
    )  # fmt: skip


def _chosen(view: View, watch: Watch) -> str:
    """The shipped prior, unless it is of another shape or kind than the surrogate images."""
    name = SHIPPED.get(tuple(view.input_shape))
    if name is None:
        return SURROGATE
    if not view.has("surrogate") or len(view.surrogate) < FEWEST:
        return name
    shipped = kept.decoder(name)
    images = view.surrogate.images[:PROBED]

    def probe(generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        del generator
        psnr = inversion_psnr(shipped, images.cpu().float(), steps=PROBE_STEPS, watch=watch)
        return {"psnr": torch.tensor(psnr)}

    facts = [shipped.card.sha256, view.surrogate.fingerprint(), PROBED, PROBE_STEPS]
    psnr = float(learned("prior-probe", facts, probe, watch=watch)["psnr"])
    ceiling = shipped.ceiling
    return SURROGATE if ceiling is not None and psnr < ceiling - FOREIGN else name


def taught(images: ImageSet, *, steps: int, latent: int, watch: Watch) -> Prior:
    """A decoder learned on public images, from the cache if it was learned before."""
    shape = drawn_shape(images.shape)
    recipe = training.Recipe(size=shape[1], latent=latent, steps=steps)

    def learn(generator: torch.Generator, watch: Watch) -> dict[str, Tensor]:
        del generator  # the recipe has a seed of its own
        share = next(watch.share((LEARNING, 1 - LEARNING)))
        made = training.train(
            images.to(torch.device("cpu")), recipe, name=SURROGATE, license="", command="",
            watch=share,
        )  # fmt: skip
        assert isinstance(made, Prior)
        figures = {f"figures/{n}": torch.tensor(float(v)) for n, v in made.card.figures.items()}
        return {**made.network.state_dict(), **figures}

    facts = [images.fingerprint(), steps, latent, 1]
    found = learned("prior", facts, learn, watch=watch)
    figures = {
        n.removeprefix("figures/"): float(t) for n, t in found.items() if n.startswith("figures/")
    }
    network = Generator(latent=latent, channels=shape[0], size=shape[1], widths=widths(shape[1]))
    weights = {n: t for n, t in found.items() if not n.startswith("figures/")}
    models.apply_state(network, weights, source="the learned prior")
    card = _card(images.name, figures)
    made = kept.wrapped(network, card)
    assert isinstance(made, Prior)
    return made


def untrained(network: Generator) -> Prior:
    """A prior that nothing was learned for."""
    made = kept.wrapped(network, _card("nothing", {}))
    assert isinstance(made, Prior)
    return made


def outlook(prior: str, view: View, *, leaves: bool) -> Outlook:
    """What a search in a prior may expect: its ceiling, where that is known.

    Args:
        prior: The attack's parameter.
        view: The adversary's side.
        leaves: Whether a later search goes beyond what the prior can draw.
    """
    shape = tuple(view.input_shape)
    if len(shape) != 3:
        return Outlook("hopeless", f"a prior draws images, the model takes inputs of {shape}")
    kept_names = named(prior, shape)
    if not kept_names:
        if not view.has("surrogate"):
            return Outlook(
                "hopeless",
                f"no shipped prior draws {shape}, and there are no surrogate images to learn one "
                "from; name one that was trained (leakatlas prior train)",
            )
        count = len(view.surrogate)
        if count < training.FEWEST_IMAGES:
            return Outlook("hopeless", f"{count} surrogate images teach no prior")
        return Outlook("unknown", f"as good as a prior that {count} surrogate images teach")
    ceiling = kept.decoder(kept_names[0]).ceiling
    if ceiling is None:
        return Outlook("unknown", "as good as the prior knows the client's kind of images")
    bound = f"the prior's own pictures of strangers reach {ceiling:.1f} dB"
    beyond = "; a later search leaves the prior" if leaves else ", and no search in it goes beyond"
    return Outlook("unknown", bound + beyond)


def notes(prior: Prior) -> dict[str, float]:
    """What a result says of its prior."""
    ceiling = prior.ceiling
    return {} if ceiling is None else {"prior_ceiling_db": ceiling}
