"""The policy search of ATS: offline, on public data, and kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import learned
from leakatlas.blocks.watch import Watch
from leakatlas.data import Box, ImageSet
from leakatlas.defenses.heuristic.learning.ats import _operations
from leakatlas.errors import InvalidInput, Unavailable
from leakatlas.fl import model_state, replay, state_hash
from leakatlas.models.structure import in_mode

POINTS = 20
"""Steps K of the way from noise to an image."""

THRESHOLD = -85.0
"""Accuracy score below which a policy is dropped, for batches of a hundred."""

FLOOR = 1e-5
"""Added to eigenvalues."""

MEAN, SPREAD = 0.7, 0.3
"""Weights of mean and variance over classes in the rank."""


def searched(
    public: ImageSet,
    trained: nn.Module,
    fresh: nn.Module,
    *,
    box: Box,
    candidates: int = 1_500,
    images: int = 5,
    batch: int = 100,
    threshold: float | None = THRESHOLD,
    keep: int = 2,
    length: int = 3,
    watch: Watch | None = None,
) -> tuple[tuple[int, ...], ...]:
    """The policies of smallest privacy score among those that keep the accuracy score up.

    Found once for the same images, networks and settings; else taken from the cache.

    Args:
        public: Images with labels of the networks' classes.
        trained: On a tenth of such data, say; the privacy score is taken on it.
        fresh: Untrained; the accuracy score is taken on it.
        box: Between pixels and model space.
        candidates: Policies drawn (1,500 in the paper).
        images: Images a class for the privacy score.
        batch: Images for the accuracy score; the threshold is for a hundred.
        threshold: Least accuracy score; none if None.
        keep: How many policies are returned.
        length: Operations of a policy.
        watch: Budget and progress.

    Raises:
        InvalidInput: If the images have no labels of their own.
        Unavailable: If no candidate keeps the accuracy score up.
    """
    if public.labels.dim() != 1 or not public.classes:
        raise InvalidInput("ATS' search needs public images with one label each.")
    facts = [
        public.fingerprint(), state_hash(model_state(trained)), state_hash(model_state(fresh)),
        repr(box), candidates, images, batch, threshold, keep, length,
    ]  # fmt: skip

    def search(draws: torch.Generator, budget: Watch) -> dict[str, Tensor]:
        accurate: dict[tuple[int, ...], tuple[float, float]] = {}
        for _ in budget.steps(candidates):
            drawn = torch.randint(len(_operations.LIBRARY), (length,), generator=draws)
            policy = tuple(drawn.tolist())
            if policy in accurate:
                continue
            noise = torch.Generator().manual_seed(0)  # every policy on the same draws
            some = public.subset(range(min(batch, len(public))))
            x = box.normalize(_under(policy, some.images, noise)).to(next(fresh.parameters()))
            if threshold is not None and accuracy_score(fresh, x) < threshold:
                continue
            accurate[policy] = _privacy_by_class(policy, public, trained, box, images, noise)
        return {"policies": torch.tensor(_ranked(accurate)[:keep])}

    found = learned("ats", facts, search, watch=watch or Watch())["policies"]
    if len(found) == 0:
        raise Unavailable(
            f"None of {candidates} policies reaches an accuracy score of {threshold}; lower "
            "threshold, which belongs to batches of a hundred, or draw more candidates."
        )
    return tuple(tuple(policy) for policy in found.tolist())


def privacy_score(
    model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, points: int = POINTS
) -> float:
    """How early gradients on the way from noise to an image become like the image's own.

    The area under the mean cosine over parameters, with a way of length 1; 1 where every point has
    the image's gradient. Positive factors on gradients do not change it.

    Args:
        model: In evaluation mode.
        x: The (transformed) image ``(1, C, H, W)``, model space.
        y: Its label ``(1,)``.
        noise: Where the way begins, shaped as ``x``.
        points: Steps K.
    """
    goal = _slopes(model, x, y)
    heights = []
    for index in range(points + 1):
        share = index / points
        here = _slopes(model, share * x + (1 - share) * noise, y)
        heights.append(
            torch.stack(
                [torch.cosine_similarity(here[n].flatten(), goal[n].flatten(), dim=0) for n in goal]
            ).mean()
        )
    return float(torch.trapezoid(torch.stack(heights)) / points)


def accuracy_score(model: nn.Module, x: Tensor) -> float:
    """How differently an untrained network reacts to images: larger is better.

    Args:
        model: Is put in evaluation mode.
        x: ``(N, C, H, W)``, model space.
    """
    x = x.detach().clone().requires_grad_()
    with in_mode(model, train=False):
        (rows,) = torch.autograd.grad(model(x).sum(), x)
    return correlation_score(rows.flatten(1))


def correlation_score(rows: Tensor) -> float:
    """``-sum(log(v + k) + 1 / (v + k))`` over the eigenvalues v of the rows' correlations."""
    v = torch.linalg.eigvalsh(torch.corrcoef(rows.double())).clamp(min=0) + FLOOR
    return float(-(v.log() + 1 / v).sum())


def _slopes(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with in_mode(model, train=False):
        return replay.gradient(
            model, parameters, dict(model.named_buffers()), x, y, create_graph=False
        )


def _under(policy: Sequence[int], images: Tensor, draws: torch.Generator) -> Tensor:
    """Images ``(N, C, H, W)`` in [0, 1] under a policy, signs drawn for each."""
    signs = (torch.randint(2, (len(images), len(policy)), generator=draws) * 2 - 1).tolist()
    return torch.stack(
        [_operations.transformed(image, policy, s) for image, s in zip(images, signs, strict=True)]
    )


def _privacy_by_class(
    policy: Sequence[int],
    public: ImageSet,
    model: nn.Module,
    box: Box,
    images: int,
    draws: torch.Generator,
) -> tuple[float, float]:
    """Mean and variance over classes of the mean score of a few images of each."""
    means = []
    for label in public.labels.unique().tolist():
        rows = (public.labels == label).nonzero()[:images, 0]
        x = box.normalize(_under(policy, public.images[rows], draws)).to(next(model.parameters()))
        noise = box.normalize(torch.rand(x.shape, generator=draws, dtype=torch.float64).to(x))
        y = torch.full((1,), label)
        scores = [privacy_score(model, x[i : i + 1], y, noise[i : i + 1]) for i in range(len(x))]
        means.append(sum(scores) / len(scores))
    mean = sum(means) / len(means)
    return mean, sum((m - mean) ** 2 for m in means) / len(means)


def _ranked(found: dict[tuple[int, ...], tuple[float, float]]) -> list[tuple[int, ...]]:
    """Policies from the most private on; mean and variance each on a scale from 0 to 1."""

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values, default=0.0), max(values, default=0.0)
        return [(v - low) / (high - low) if high > low else 0.0 for v in values]

    means = scaled([mean for mean, _ in found.values()])
    spreads = scaled([variance for _, variance in found.values()])
    ranks = {
        p: MEAN * m + SPREAD * s if math.isfinite(m + s) else math.inf
        for p, m, s in zip(found, means, spreads, strict=True)
    }
    return sorted(ranks, key=lambda p: ranks[p])
