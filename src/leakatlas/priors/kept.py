"""Priors in files: those shipped, those that ``leakatlas prior train`` left, those of a cache.

A prior is ``NAME.safetensors`` with its provenance card ``NAME.json`` beside it, and fingerprints
of the images that it was trained on (``*.seen``), by which a victim among them is recognised. All
of it is data; nothing that is read here is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from leakatlas import models, reading, tensorfiles
from leakatlas.errors import InvalidInput, shown
from leakatlas.models import Card, Denoiser, Generator, checkpoints
from leakatlas.models.registry import build
from leakatlas.priors import foreign
from leakatlas.priors.prior import Diffusion, Part, Prior, alone, linear_schedule

ARCHITECTURES = ("generator", "denoiser")
"""Models of the registry that are priors."""


def load(name: str | Path) -> Prior | Diffusion:
    """A shipped prior by name, or that of a folder or a card, or one of others.

    Args:
        name: A name of :func:`shipped`, a folder with one prior, or the path of its card; or a
            folder with a ``prior.yaml`` (:mod:`leakatlas.priors.foreign`).

    Raises:
        InvalidInput: If there is none, or if the files are damaged or do not belong together.
    """
    if str(name) in shipped():
        return of_card(
            checkpoints.card(str(name)), checkpoints.load_weights(str(name)), checkpoints.WEIGHTS
        )
    path = card_file(name)
    if path is None:
        return foreign.load(Path(name))
    about = checkpoints.read_card(path)
    held = checkpoints.read_state(path.with_name(f"{about.name}.safetensors")).state
    floats = {n: t.float() if t.is_floating_point() else t for n, t in held.items()}
    return of_card(about, floats, path.parent)


def card_file(name: str | Path) -> Path | None:
    """Where the card of such a prior lies; None for one of others, which has a recipe instead.

    Raises:
        InvalidInput: If there is none.
    """
    if str(name) in shipped():
        return checkpoints.WEIGHTS / f"{name}.json"
    path = Path(name)
    if foreign.describes(path):
        return None
    if reading.is_folder(path):
        cards = sorted(path.glob("*.json"))
        if len(cards) != 1:
            raise InvalidInput(
                f"{shown(str(path))} holds {len(cards)} cards of priors; name one of them, such as "
                f"{shown(str(path / 'NAME.json'))}, or a shipped prior: {', '.join(shipped())}."
            )
        path = cards[0]
    if path.suffix != ".json" or not reading.is_file(path):
        raise InvalidInput(
            f"There is no prior {shown(str(name))}; expected a shipped one "
            f"({', '.join(shipped())}), or a folder that `leakatlas prior train` wrote."
        )
    return path


def decoder(name: str | Path) -> Prior:
    """As :func:`load`, for an attack that searches latents.

    Raises:
        InvalidInput: If it is a diffusion model, which has none.
    """
    found = load(name)
    if isinstance(found, Diffusion):
        raise InvalidInput(
            f"The prior {shown(str(name))} is a diffusion model and has no latents to search; "
            "take a generator (--kind vae or gan)."
        )
    return found


def diffusion(name: str | Path) -> Diffusion:
    """As :func:`load`, for an attack that guides a diffusion model.

    Raises:
        InvalidInput: If it is none.
    """
    found = load(name)
    if isinstance(found, Prior):
        raise InvalidInput(
            f"The prior {shown(str(name))} is a generator, no diffusion model; take one of "
            "--kind ddpm."
        )
    return found


def shipped() -> tuple[str, ...]:
    """Names of the priors in the package."""
    return tuple(n for n in checkpoints.shipped() if checkpoints.card(n).model in ARCHITECTURES)


def of_card(about: Card, weights: Mapping[str, Tensor], folder: Path | None) -> Prior | Diffusion:
    """The prior of a card and of weights.

    Args:
        about: The card.
        weights: By name.
        folder: Where the fingerprints of its training images lie, if anywhere.

    Raises:
        InvalidInput: If the card describes no prior, or other weights than these.
    """
    if about.model not in ARCHITECTURES:
        raise InvalidInput(
            f"The card of {shown(about.name)} describes a {shown(about.model)}; a prior is one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    network = build(about.model, **about.settings)
    models.apply_state(network, weights, source=about.name)
    seen = None
    if about.seen and folder is not None:
        seen = _fingerprints(folder / about.seen)
    return wrapped(network.eval().requires_grad_(False), about, seen)


def wrapped(network: nn.Module, about: Card, seen: Tensor | None = None) -> Prior | Diffusion:
    """One of our own networks as a prior."""
    if isinstance(network, Denoiser):
        shape = (network.channels, network.size, network.size)
        return Diffusion(network, about, shape, linear_schedule(), seen)
    assert isinstance(network, Generator)
    shape = (network.channels, network.size, network.size)
    latent = (network.latent,)
    return Prior(network, about, latent, shape, network.classes, opened(network), seen)


def opened(network: Generator) -> tuple[Part, ...]:
    """The stages of one of our generators; the embedding of a label goes into the first."""
    first, *rest = network.stages

    def begin(z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return (first(network.enter(z, y)),)

    return (begin, *map(alone, rest))


def save(prior: Prior | Diffusion, folder: Path, *, half: bool = True) -> Card:
    """Write weights, card and fingerprints; the returned card has the file's SHA-256.

    Args:
        prior: One of our own architectures.
        folder: Where to.
        half: Store weights in float16.
    """
    network = prior.network
    assert isinstance(network, (Generator, Denoiser))
    about = prior.card
    if prior.seen is not None and not about.seen:
        about = replace(about, seen=f"{about.name}.seen")
    written = checkpoints.save_weights(network, about, folder, half=half)
    if prior.seen is not None:
        content = safetensors.torch.save({"seen": prior.seen.contiguous()})
        (folder / about.seen).write_bytes(content)
    return written


def settings_of(network: nn.Module) -> dict[str, Any]:
    """What builds one of our networks again."""
    if isinstance(network, Generator):
        return {
            "latent": network.latent, "channels": network.channels, "size": network.size,
            "widths": list(network.widths), "classes": network.classes,
        }  # fmt: skip
    assert isinstance(network, Denoiser)
    return {"channels": network.channels, "size": network.size, "widths": list(network.widths)}


def _fingerprints(path: Path) -> Tensor:
    tensors, _ = tensorfiles.read_safetensors(path, what="list of images that a prior has seen")
    seen = tensors.get("seen")
    if seen is None or seen.dtype != torch.int32 or seen.dim() != 1:
        raise InvalidInput(f"{shown(str(path))} holds no fingerprints of images.")
    return seen
