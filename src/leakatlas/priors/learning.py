"""How a prior is learned: three recipes, one loop.

**vae** (:mod:`.vae`) takes minutes on a CPU, and of the three its latents come closest to a given
image; **gan** (:mod:`.gan`) draws the sharpest; **ddpm** (:mod:`.ddpm`) is a diffusion model.
Horizontal flips throughout, unless told otherwise.
"""

from __future__ import annotations

import io
import pickle
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leakatlas import sealed
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.errors import InvalidInput
from leakatlas.priors.ddpm import Denoising
from leakatlas.priors.gan import Adversaries
from leakatlas.priors.lesson import Draws, Lesson
from leakatlas.priors.stopping import Stopping
from leakatlas.priors.vae import Autoencoder

Kind = Literal["vae", "gan", "ddpm"]
KINDS: tuple[Kind, ...] = ("vae", "gan", "ddpm")

NOTED_EVERY = 50
"""Steps between two notes: reading a figure waits for the device."""

_UNREADABLE: tuple[type[Exception], ...] = (*sealed.MALFORMED, pickle.UnpicklingError)


def batch_of(kind: Kind, size: int) -> int:
    """Images in a step, if nobody says otherwise: what a CPU does in a tenth of a second or two."""
    return 32 if kind == "ddpm" or size >= 64 else 64


def lesson(
    kind: Kind,
    shape: tuple[int, int, int],
    *,
    latent: int,
    classes: int = 0,
    width: int = 1,
    batch: int | None = None,
) -> Lesson:
    """The recipe of a kind, its networks freshly drawn from the global generator's seed.

    Args:
        kind: Which.
        shape: ``(C, S, S)`` of its images.
        latent: Length of the latent.
        classes: Labels that it is conditioned on; 0 for none.
        width: Factor on the network's feature maps.
        batch: Images in a step; as :func:`batch_of` if None.

    Raises:
        InvalidInput: If only a GAN can be conditional and another kind is asked for.
    """
    if classes and kind != "gan":
        raise InvalidInput(f"A prior of kind {kind!r} is not conditional; only a gan takes labels.")
    batch = batch or batch_of(kind, shape[1])
    match kind:
        case "vae":
            return Autoencoder(shape, latent, width=width, batch=batch)
        case "gan":
            return Adversaries(shape, latent, classes, width=width, batch=batch)
        case "ddpm":
            return Denoising(shape, width=width, batch=batch)


def teach(
    taught: Lesson,
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    watch: Watch,
    flips: bool = True,
    checkpoint: Path | None = None,
    stopping: Stopping | None = None,
) -> int:
    """Learn from images for so many steps, in place, on the device of the images; the steps made.

    Args:
        taught: What learns; it moves to that device.
        images: ``(M, C, S, S)`` in [0, 1].
        labels: ``(M,)``.
        steps: Steps.
        generator: Order, flips and noise; on the CPU.
        watch: Budget and progress; fewer steps than asked for go through the whole schedule.
        flips: Whether half the images are mirrored.
        checkpoint: A file to go on from, and to leave behind if stopped.
        stopping: What ends it when it learns no more; afterwards it holds the best weights.
    """
    taught.nets.to(images.device)
    draws = Draws(generator, images.device)
    batch = min(taught.batch, len(images))
    first = 0 if checkpoint is None else _resume(checkpoint, taught, steps, generator, stopping)
    fewest = max(FEWEST - first, 1)  # of the whole training, however often it was stopped
    made, kept = first, time.perf_counter()
    wanted = first if stopping is not None and stopping.over else steps
    for step in watch.steps(wanted, first=first, stretches=True, fewest=fewest):
        chosen = draws.whole(0, len(images), batch)
        x, y = images[chosen], labels[chosen]
        if flips:
            x = torch.where(draws.uniform(batch, 1, 1, 1) < 0.5, x.flip(3), x)
        figure = taught.step(x, y, draws, step.progress)
        made = step.index + 1
        if made % NOTED_EVERY == 0:
            watch.note = f"{taught.measured} {float(figure):.3g}"
        if stopping is not None and stopping.due(made, step.progress):
            stopping.look(made, taught.result())
        if checkpoint is not None and time.perf_counter() - kept > watch.conduct.save_every:
            _keep(checkpoint, taught, made, steps, generator, stopping)
            kept = time.perf_counter()
        if stopping is not None and stopping.over:
            break
    if checkpoint is not None:
        _keep(checkpoint, taught, made, steps, generator, stopping)
    # Not kept: a training that goes on would not have looked here.
    if stopping is not None and not any(step == made for step, _ in stopping.curve):
        stopping.look(made, taught.result())
    return made


def _keep(
    file: Path,
    taught: Lesson,
    made: int,
    steps: int,
    generator: torch.Generator,
    stopping: Stopping | None,
) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "steps": steps,
            "made": made,
            "nets": taught.nets.state_dict(),
            "optimizers": [o.state_dict() for o in taught.optimizers],
            "draws": generator.get_state(),
            "global": torch.get_rng_state(),
            "stopping": None if stopping is None else stopping.state(),
        },
        buffer,
    )
    sealed.seal(file, buffer.getvalue())


def _resume(
    file: Path,
    taught: Lesson,
    steps: int,
    generator: torch.Generator,
    stopping: Stopping | None,
) -> int:
    """Steps that were made already; 0 if nothing usable is kept."""
    content = sealed.unseal(file)
    if content is None:
        return 0
    try:
        held: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
        if held["steps"] != steps:
            sealed.discard(file, "it belongs to a training of another length")
            return 0
        taught.nets.load_state_dict(held["nets"])
        for optimizer, state in zip(taught.optimizers, held["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if stopping is not None:
            stopping.resume(held["stopping"])
        generator.set_state(held["draws"])
        torch.set_rng_state(held["global"])
        return int(held["made"])
    except _UNREADABLE:
        sealed.discard(file, "it is not a checkpoint of this training")
        return 0
