"""Whether a trained model sees inputs as in its training: the statistics that it kept, the labels.

A normalisation that was forgotten, or is another one, leaves two traces. Batch normalisation
remembers the mean and variance of what reached it in training, and a trained model recognises
images. Neither is held against a threshold alone, which one odd image would cross: the images are
also brought in by the other usual normalisations, and only one that is much better is worth a
warning. A model that was never trained says nothing either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leakatlas.data import CIFAR10, IMAGENET, Box
from leakatlas.models.structure import batchnorm_layers, hooked, in_mode

MISFIT = 0.5
"""Nats by which a batch must miss the running statistics before anything is said."""
BETTER = 4.0
"""Factor by which another normalisation must miss them less."""
CHANCE = 0.002
"""Probability (one-sided sign test) below which a gain in accuracy is none of chance."""


class Reading(NamedTuple):
    """How a model takes a batch.

    Args:
        misfit: Mean over channels of KL(batch || running) at the first trained batch normalisation
            that is reached, both as Gaussians, in nats; None without one.
        right: ``(N,)`` which examples are classified as labelled; None without labels of classes.
    """

    misfit: float | None
    right: Tensor | None


def about_the_inputs(
    model: nn.Module, x: Tensor, y: Tensor, box: Box
) -> tuple[dict[str, float], list[str]]:
    """Figures, and a warning if another normalisation than the box fits the model much better.

    Args:
        model: As the client received it; not changed.
        x: Inputs ``(N, C, H, W)``, model space.
        y: Labels ``(N,)``; vectors of targets are not judged.
        box: How ``x`` was normalised.
    """
    own = reading_of(model, x, y)
    others = _under_others(model, x, y, box) if _may_be_wrong(own) else {}
    facts, findings = {}, []
    if own.right is not None:
        facts["accuracy on the batch"] = float(own.right.double().mean())
    if own.misfit is not None:
        facts["misfit of the running statistics (nats)"] = own.misfit
        fits = [(r.misfit or 0.0, name) for name, r in others.items()]
        best, name = min(fits, default=(math.inf, ""))
        if own.misfit > BETTER * best:
            findings.append(
                "The inputs seem to be normalised otherwise than in training: they miss the "
                f"running statistics of batch normalisation by {own.misfit:.2g} nats, by "
                f"{best:.2g} {name}. {_WAY_OUT}"
            )
    if own.right is not None and own.misfit is None and others:  # statistics say more than labels
        gains = {n: r.right for n, r in others.items() if r.right is not None}
        name = max(gains, key=lambda n: int(gains[n].sum()))
        # Inputs far outside the training make a model say one class always, which may be theirs.
        always = y == y.mode().values
        if max(_by_chance(right, gains[name]) for right in (own.right, always)) < CHANCE:
            findings.append(
                "The inputs seem to be normalised otherwise than in training: the model recognises "
                f"{int(own.right.sum())} of {len(y)} images, and {int(gains[name].sum())} {name}. "
                f"{_WAY_OUT}"
            )
    return facts, findings


_WAY_OUT = "Give the mean and std of the training (box=, or data.mean and data.std in YAML)."


def _may_be_wrong(own: Reading) -> bool:
    """Whether any other normalisation could be worth a warning: each costs a pass."""
    if own.misfit is not None:
        return own.misfit > MISFIT
    return own.right is not None and _by_chance(own.right, torch.ones_like(own.right)) < CHANCE


def _under_others(model: nn.Module, x: Tensor, y: Tensor, box: Box) -> dict[str, Reading]:
    """How the model takes the batch under the other usual normalisations."""
    pixels = box.denormalize(x)
    return {
        name: reading_of(model, other.normalize(pixels), y)
        for name, other in _usual(box.channels).items()
        if (other.mean, other.std) != (box.mean, box.std)
    }


def reading_of(model: nn.Module, x: Tensor, y: Tensor) -> Reading:
    """Run a batch through a model in eval mode; as :func:`about_the_inputs`."""
    trained = [layer for layer in batchnorm_layers(model).values() if _is_trained(layer)]
    misfits: list[float] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del output
        if not misfits:
            misfits.append(_misfit(layer, inputs[0]))

    # Dropout is off; what draws nevertheless must not move the caller's generator.
    with (
        in_mode(model, train=False),
        hooked(trained, note),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        outputs = model(x)
    judged = y.dim() == 1 and outputs.shape[1] > 1
    return Reading(misfits[0] if misfits else None, outputs.argmax(1) == y if judged else None)


def _usual(channels: int) -> Mapping[str, Box]:
    found = {
        "as pixels of [0, 1]": Box.unit(channels),
        "as pixels of [-1, 1]": Box((0.5,) * channels, (0.5,) * channels),
        "as pixels of 0 to 255": Box((0.0,) * channels, (1 / 255,) * channels),
    }
    if channels == 3:
        found |= {"under ImageNet's mean and std": IMAGENET, "under CIFAR-10's": CIFAR10}
    return found


def _is_trained(layer: nn.Module) -> bool:
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    return bool((mean != 0).any()) or bool((var != 1).any())


def _misfit(layer: nn.Module, reached: Tensor) -> float:
    mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    axes = [axis for axis in range(reached.dim()) if axis != 1]
    seen = reached.double()
    ratio = seen.var(axes, correction=0).clamp(min=1e-12) / var.double().clamp(min=1e-12)
    shift = (seen.mean(axes) - mean.double()).square() / var.double().clamp(min=1e-12)
    return float((ratio + shift - 1 - ratio.log()).mean() / 2)


def _by_chance(own: Tensor, other: Tensor) -> float:
    """Probability of so many gains among the examples on which two readings differ, were it even.

    >>> _by_chance(torch.zeros(8).bool(), torch.ones(8).bool())
    0.00390625
    """
    gained, lost = int((other & ~own).sum()), int((own & ~other).sum())
    differ = gained + lost
    return float(sum(math.comb(differ, k) for k in range(gained, differ + 1)) / 2.0**differ)
