"""From images to a prior with its card: what ``leakatlas prior train`` and the attacks do."""

from __future__ import annotations

import copy
import datetime
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas import devices
from leakatlas.blocks.watch import PACED, Watch
from leakatlas.data import ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.models import Card, Denoiser, Generator
from leakatlas.models.parts import seeded
from leakatlas.priors.ddpm import noised
from leakatlas.priors.kept import settings_of, wrapped
from leakatlas.priors.learning import Kind, lesson, teach
from leakatlas.priors.lesson import Draws, Lesson, drawn_shape
from leakatlas.priors.prior import (
    CEILING,
    INVERTED,
    Diffusion,
    Prior,
    closest,
    fingerprints,
    fit_pixels,
    inversion_psnr,
    linear_schedule,
)
from leakatlas.priors.stopping import LOOKED_AT, PATIENCE, SEARCH_LR, SEARCH_STEPS, Stopping

STOPPED = "stopped_by_inversion_psnr"
"""The figure of a card that is 1 if training ended because the inversion PSNR rose no more, 0 if it
had the length that was asked for."""

LOOK = "inversion_psnr_db_at_step_"
"""What the figures of the looks on the way begin with."""

HELD_OUT = 0.1
"""Share of the images that is held out to measure the prior, at most :data:`INVERTED` of them."""

FEWEST_IMAGES = 8
"""Images below which nothing is learned that could be called a population."""

LEARNED = 0.92
"""Share of a budget for learning; the rest measures what was learned."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a prior is learned.

    Args:
        kind: vae, gan or ddpm.
        size: Side of its images; that of the data, rounded up to a multiple of 8, if None.
        grey: Whether colours are averaged away.
        conditional: Whether it is conditioned on the labels; a gan only.
        latent: Length of the latent.
        width: Factor on the network's feature maps.
        batch: Images in a step; as :func:`.learning.batch_of` if None.
        steps: Steps of training; a deadline makes them fewer, under the whole schedule.
        flips: Whether images are mirrored at random.
        seed: Of weights, order and noise.
        patience: Looks at its inversion PSNR without a better one after which a gan stops; 0 for no
            looks, a fixed length, and the last weights. The others end with their schedule.
    """

    kind: Kind = "vae"
    size: int | None = None
    grey: bool = False
    conditional: bool = False
    latent: int = 128
    width: int = 1
    batch: int | None = None
    steps: int = 2_000
    flips: bool = True
    seed: int = 0
    patience: int = PATIENCE


def train(
    data: ImageSet,
    recipe: Recipe,
    *,
    name: str,
    license: str,
    command: str,
    source: str = "",
    watch: Watch,
    checkpoint: Path | None = None,
    measure: bool = True,
    device: torch.device = devices.CPU,
) -> Prior | Diffusion:
    """A prior learned on images, with its card.

    The last tenth (at most 64 images) is held out and measured on; it is no victim of an attack
    either, so that the figure stays one of strangers. Of the rest, a gan keeps the last twentieth
    (at most 32) to stop by: what chose the weights is nothing to measure them on.

    Args:
        data: The images; labels are used by a conditional prior only.
        recipe: How.
        name: Of the prior.
        license: Of its weights.
        command: What makes it again, for the card, without the number of steps.
        source: What the images are, for the card; the name of the data if empty.
        watch: Budget and progress.
        checkpoint: A file to go on from, and to leave behind if stopped.
        measure: Whether the held-out figures are computed, if time is left.
        device: Where it learns; what comes back lies on the CPU.

    Raises:
        InvalidInput: If there are too few images, or labels are missing.
    """
    images, labels = _population(data, recipe)
    _, channels, side, _ = images.shape
    shape = (channels, side, side)
    stops = recipe.kind == "gan" and recipe.patience > 0
    shares = kept, looked, _ = _shares(len(images), stops)
    known = kept + looked
    classes = len(data.classes) if recipe.conditional else 0
    x, y = images[:kept].to(device), labels[:kept].to(device)
    shown = images[kept:known].to(device), labels[kept:known].to(device)
    stopping = Stopping(lambda net: _look(net, *shown), recipe.patience) if stops else None

    def made(
        steps: int, watch: Watch, checkpoint: Path | None, stopping: Stopping | None
    ) -> tuple[Lesson, int]:
        with seeded(recipe.seed):
            taught = lesson(
                recipe.kind, shape, latent=recipe.latent, classes=classes, width=recipe.width,
                batch=recipe.batch,
            )  # fmt: skip
            draws = torch.Generator().manual_seed(recipe.seed)
            return taught, teach(
                taught, x, y, steps=steps, generator=draws, watch=watch, flips=recipe.flips,
                checkpoint=checkpoint, stopping=stopping,
            )  # fmt: skip

    if device.type == "cuda":
        # Libraries load in the first steps; a budget is paced by others.
        made(PACED, Watch(), None, None)
    begun, since = time.process_time(), time.perf_counter()
    share = next(watch.share((LEARNED, 1 - LEARNED))) if measure else watch
    taught, steps = made(recipe.steps, share, checkpoint, stopping)
    seconds, passed = time.process_time() - begun, time.perf_counter() - since
    network = taught.result().cpu().requires_grad_(False)
    if stopping is not None:
        network.load_state_dict(stopping.weights)
    # One that ended by itself had the schedule that was asked for, and ends so again.
    asked = recipe.steps if stopping is not None and stopping.over else steps
    card = Card(
        name=name,
        model="denoiser" if isinstance(network, Denoiser) else "generator",
        settings=settings_of(network),
        box=None,
        data=f"{source or data.name} ({data.fingerprint()[:12]})",
        split=_in_words(*shares),
        recipe=f"{command} --steps {asked}",
        seed=recipe.seed,
        epochs=math.ceil(steps * min(taught.batch, kept) / kept),
        figures={},
        date=datetime.date.today().isoformat(),
        license=license,
        sha256="",
        device=devices.in_words(device),
    )
    prior = wrapped(network, card, fingerprints(images[:known], shape).unique())
    left = watch.remaining()
    if measure and (left is None or left > 0):
        held_out = images[known:].to(device), labels[known:].to(device)
        network.to(device)
        card.figures.update(_figures(prior, *held_out, x.mean(0), watch))
        network.cpu()
    card.figures.update(
        {"steps": steps, "cpu_seconds": round(seconds), "wall_seconds": round(passed)}
    )
    if recipe.kind == "gan":
        card.figures.update({STOPPED: 0} if stopping is None else told(stopping))
    return prior


def _population(data: ImageSet, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Images as the prior will draw them, and labels, zeros where there are none."""
    if len(data) < FEWEST_IMAGES:
        raise InvalidInput(
            f"A prior is learned on a population; {data.name} holds {len(data)} images, expected "
            f"{FEWEST_IMAGES} at the least, and thousands for pictures worth looking at."
        )
    if recipe.conditional and data.labels.dim() != 1:
        raise InvalidInput(f"A conditional prior needs one label an image; {data.name} has none.")
    channels = 1 if recipe.grey else data.channels
    side = recipe.size or max(data.shape[1:])
    images = fit_pixels(data.images.detach().float().cpu(), drawn_shape((channels, side, side)))
    labels = data.labels if data.labels.dim() == 1 else torch.zeros(len(data), dtype=torch.int64)
    return images, labels


def _shares(images: int, stops: bool) -> tuple[int, int, int]:
    """How many are learned from, stopped by, and held out, in this order."""
    held = min(INVERTED, max(1, round(HELD_OUT * images)))
    looked = min(LOOKED_AT, max(1, round(HELD_OUT / 2 * images))) if stops else 0
    return images - held - looked, looked, held


def _in_words(kept: int, looked: int, held: int) -> str:
    stopping = f"the next {looked} to stop by, " if looked else ""
    first = f"the first {kept:,} of {kept + looked + held:,} images; "
    return f"{first}{stopping}the last {held} held out"


def told(stopping: Stopping) -> dict[str, float]:
    """What a card says of how its training was stopped."""
    return {
        STOPPED: int(stopping.over),
        "weights_of_step": stopping.best[0],
        **{f"{LOOK}{step}": round(v, 2) for step, v in stopping.curve if math.isfinite(v)},
    }


def _look(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The figure by which a gan is stopped; the network is left as it is."""
    assert isinstance(network, Generator)
    still = copy.deepcopy(network).requires_grad_(False)
    return closest(
        lambda z: still(z, labels if still.classes else None), (still.latent,), images,
        steps=SEARCH_STEPS, lr=SEARCH_LR, watch=Watch(),
    )  # fmt: skip


def _figures(
    prior: Prior | Diffusion, held: Tensor, labels: Tensor, mean: Tensor, watch: Watch
) -> dict[str, Any]:
    """What the card says of held-out images."""
    error = (held - mean).square().flatten(1).mean(1)
    null = {"held_out_psnr_db_of_mean_image": round(float(-10 * error.log10().mean()), 2)}
    if isinstance(prior, Prior):
        return {CEILING: round(inversion_psnr(prior, held, labels, watch=watch), 2), **null}
    kept = linear_schedule().to(held.device)
    draws = Draws(torch.Generator().manual_seed(0), held.device)
    errors = []
    for t in (50, 200, 500):
        noise = draws.normal(*held.shape)
        x = noised(2 * held - 1, noise, kept[t].expand(len(held)))
        with torch.no_grad():
            errors.append(float(F.mse_loss(prior.noise(x, t), noise)))
    return {"held_out_noise_error": round(sum(errors) / len(errors), 4), **null}
