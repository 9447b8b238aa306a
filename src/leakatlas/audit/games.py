"""The adversary's own games: public images, labelled as the victim's seem to be, and their updates.

The labels of its images are drawn from the model's own predictive distribution: a calibrated
network is then as often surprised as by its real data. How often classes repeat follows the labels
granted or recovered from the victim's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.attacks.api import Reconstruction
from leakatlas.blocks import observed
from leakatlas.data import ImageSet
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import View, stream
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.baselines import mean_image
from leakatlas.metrics.images import psnr_of_mse

CROPS = 96
"""Bundled crops to rehearse on, where the adversary holds no surrogate."""

CEILING = 60.0
"""PSNR in dB at which an image of the rehearsal counts as rebuilt; an exact one is infinite."""


@dataclass(frozen=True)
class Game:
    """One batch of the adversary's own, and what it would see of it.

    Args:
        truth: ``(N, C, H, W)`` in [0, 1].
        view: The rehearsal's view.
        null: dB of the mean public image.
    """

    truth: Tensor
    view: View
    null: float


def own_games(view: View, public: ImageSet, count: int, *, seed: int) -> list[Game]:
    """``count`` batches of public images, labelled as the victim's seem to be, and their views."""
    repeats = multiplicity(view)
    model = view.model.eval()
    like = next(model.parameters())
    box = view.box if view.has("box") else None
    surrogate: ImageSet | None = None
    if view.has("surrogate"):
        # A prior learned on the very images that it is to rebuild would flatter its attack.
        surrogate, public = halves(public)
    pool = public.images.to(like)
    inputs = pool if box is None else box.normalize(pool)
    with torch.no_grad():
        beliefs = torch.cat([model(part).softmax(1) for part in inputs.split(64)]).double().cpu()
    generator = stream(seed, "rehearsal", "images")
    games: list[Game] = []
    for number in range(count):
        chosen, labels = labelled(beliefs, repeats, generator)
        others = torch.ones(len(pool), dtype=torch.bool)
        others[chosen] = False
        y = torch.tensor(labels, device=like.device)
        truth = pool[chosen]
        average = mean_image(pool[others]).expand(truth.shape)
        null = float(psnr_of_mse((average - truth.double()).square().flatten(1).mean(1)).mean())
        own = view.rehearse(inputs[chosen], y, seed=seed + number, surrogate=surrogate)
        games.append(Game(truth, own, null))
    return games


def halves(public: ImageSet) -> tuple[ImageSet, ImageSet]:
    """What a rehearsal's adversary holds as its surrogate, and what it attacks: no image twice."""
    return public.subset(range(1, len(public), 2)), public.subset(range(0, len(public), 2))


def multiplicity(view: View) -> tuple[int, ...]:
    """How often each class occurs in the private batch, largest first, as far as can be known.

    Granted labels say it; otherwise the rule that attacks use; distinct classes if that fails.
    """
    N = view.num_examples
    try:
        y = observed.known_labels(view)
    except LeakAtlasError:
        return (1,) * N
    if y.dim() > 1:  # several labels at once: no class to count
        return (1,) * N
    counts = torch.bincount(y)
    return tuple(sorted((int(c) for c in counts if c > 0), reverse=True))


def labelled(
    beliefs: Tensor, repeats: Sequence[int], generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Indices of images and labels for them, each class as often as ``repeats`` says.

    A class comes from the predictive distribution of a random image; the further images of that
    class are those that the model finds likeliest to belong to it.

    Args:
        beliefs: Class probabilities ``(P, K)`` of the public images.
        repeats: Occurrences of each class.
        generator: Of the draws, on the CPU.
    """
    free = torch.randperm(len(beliefs), generator=generator).tolist()
    taken: set[int] = set()
    chosen: list[int] = []
    labels: list[int] = []
    for times in repeats:
        first = free.pop(0) if free else int(torch.randint(len(beliefs), (1,), generator=generator))
        belief = beliefs[first].clone()
        belief[sorted(taken)] = 0
        if float(belief.sum()) <= 0:  # sure of a class that is taken
            belief = torch.ones_like(belief)
            belief[sorted(taken)] = 0 if len(taken) < len(belief) else 1
        label = int(torch.multinomial(belief, 1, generator=generator))
        taken.add(label)
        likeliest = sorted(free, key=lambda index: -float(beliefs[index, label]))[: times - 1]
        free = [index for index in free if index not in likeliest]
        group = [first, *likeliest]
        chosen += [group[i % len(group)] for i in range(times)]
        labels += [label] * times
    return chosen, labels


def own_psnr(found: Reconstruction, game: Game) -> float:
    """Mean dB over a batch of the adversary's own, one candidate for each image.

    An image without a candidate counts as nothing learned: the null baseline.
    """
    if len(found.images) == 0:
        return game.null
    images = game.view.box.denormalize(found.images) if game.view.has("box") else found.images
    cost = pairwise_mse(images.to(game.truth).clamp(0, 1), game.truth)
    values = [
        game.null if row is None else min(float(psnr_of_mse(cost[row, column])), CEILING)
        for column, row in enumerate(assign(cost).of_original)
    ]
    return sum(values) / len(values)
