"""HF-GradInv's counts: a search against a reference profile of the features.

Ye et al., "High-Fidelity Gradient Inversion in Distributed Learning", AAAI 2024; the search is that
of the released code.

A class is taken as present if the mean of its weight gradient is negative. A row of the gradient is
a multiple of its samples' features, and sorted features look alike from image to image: the ranks
that vary least are the reference. Counts are sought for which reference times count resembles the
observed sorted rows best (cosine), by evolution: uniform crossover with a shuffled mate, one unit
moved by mutation, a child replaces its parent if it fits better.

The cosine reads ratios between classes only: one present class fits any count, and well-fitted
samples, whose rows shrink, bias the answer.

Departures: where there are few enough count vectors all are tried instead of evolved. Repairing a
sum adds or takes units at random places; the released code dumps the remainder on the last class,
which may drop below 1. The reference is built from whatever public data and model are at hand;
the released code ships files for one ResNet-34.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leakatlas.blocks.labels import _checks
from leakatlas.blocks.labels.moments import HeadPass

ENUMERABLE = 100_000
"""Up to this many count vectors are all tried."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What the features of one sample look like when sorted by size.

    Args:
        ranks: Places in the ascending order that vary least between images, ``(P,)``.
        values: Mean feature at these ranks, ``(P,)``.
    """

    ranks: Tensor
    values: Tensor


def reference_profile(public: HeadPass, *, ranks: int = 20) -> Profile:
    """Build the reference from public inputs, unlabelled, at the victim's weights.

    Ranks whose mean is 0 (dead features) vary not at all and tell nothing; they are left out
    unless there is nothing else.
    """
    ordered = public.features.double().abs().sort(dim=1).values
    mean = ordered.mean(dim=0)
    variation = ordered.std(dim=0, correction=0) / mean.clamp(min=1e-12)
    variation[mean <= 0] = torch.inf
    keep = variation.argsort(stable=True)[: min(ranks, ordered.shape[1])].sort().values
    return Profile(ranks=keep, values=mean[keep])


def hf_gradinv(
    weight_grad: Tensor,
    profile: Profile,
    batch_size: int,
    *,
    generator: torch.Generator,
    population: int = 20,
    iterations: int = 200,
    enumerable: int = ENUMERABLE,
) -> Tensor:
    """Counts ``(K,)`` that fit the reference profile best.

    Args:
        weight_grad: Gradient of the head's weight ``(K, D)``.
        profile: From :func:`reference_profile`.
        batch_size: B.
        generator: Source of the search, on the CPU.
        population: Count vectors alive at a time.
        iterations: Generations.
        enumerable: Try all count vectors if there are no more than this; 0 always evolves.
    """
    _checks.matrix("hf_gradinv", weight_grad)
    _checks.batch("hf_gradinv", batch_size)
    means = torch.nan_to_num(weight_grad.double().mean(dim=1))
    order = means.argsort(stable=True)
    present = order[means[order] < 0][:batch_size]
    if len(present) == 0:
        present = order[:1]
    rows = torch.nan_to_num(weight_grad[present].double()).abs().sort(dim=1).values
    # the cosine of n x reference with the rows depends on the rows through these products only
    fit = (rows[:, profile.ranks] @ profile.values.to(rows)).cpu()
    if math.comb(batch_size - 1, len(present) - 1) <= enumerable:
        best = enumerate_counts(fit, batch_size)
    else:
        best = evolve_counts(
            fit, batch_size, generator=generator, population=population, iterations=iterations
        )
    counts = torch.zeros(len(means), dtype=torch.int64, device=weight_grad.device)
    counts[present] = best.to(counts)
    return counts


def fitness(counts: Tensor, fit: Tensor) -> Tensor:
    """``n . fit / ||n||`` for each row of counts ``(M, P)``: the cosine up to a constant."""
    n = counts.double()
    return (n @ fit) / n.square().sum(dim=1).sqrt()


def enumerate_counts(fit: Tensor, total: int) -> Tensor:
    """The best of all integer vectors >= 1 that sum to ``total``, ``(P,)``."""
    cuts = itertools.combinations(range(1, total), len(fit) - 1)
    ends = torch.tensor([(0, *cut, total) for cut in cuts], dtype=torch.int64)
    every = ends.diff(dim=1)
    return every[fitness(every, fit).argmax()]


def evolve_counts(
    fit: Tensor,
    total: int,
    *,
    generator: torch.Generator,
    population: int = 20,
    iterations: int = 200,
) -> Tensor:
    """The best integer vector >= 1 summing to ``total`` that evolution finds, ``(P,)``."""
    classes = len(fit)
    drawn = torch.randint(classes, (population, total - classes), generator=generator)
    alive = torch.ones(population, classes, dtype=torch.int64)
    alive.scatter_add_(1, drawn, torch.ones_like(drawn))
    if classes == 1 or classes == total:
        return alive[0]
    for _ in range(iterations):
        mates = alive[torch.randperm(population, generator=generator)]
        mask = torch.randint(2, alive.shape, generator=generator).bool()
        children = torch.where(mask, alive, mates)
        children = move_one(repaired(children, total, generator), generator)
        fitter = fitness(children, fit) > fitness(alive, fit)
        alive = torch.where(fitter[:, None], children, alive)
    return alive[fitness(alive, fit).argmax()]


def repaired(children: Tensor, total: int, generator: torch.Generator) -> Tensor:
    """Every row ``(M, P)`` brought to the sum, one random unit at a time, never below 1."""
    children = children.clone()
    while bool((left := total - children.sum(dim=1)).any()):
        for rows, sign in ((left > 0, 1), (left < 0, -1)):
            if bool(rows.any()):
                able = torch.ones_like(children) if sign > 0 else children > 1
                c = torch.multinomial(able[rows].double(), 1, generator=generator)
                children[rows] = children[rows].scatter_add(1, c, torch.full_like(c, sign))
    return children


def move_one(children: Tensor, generator: torch.Generator) -> Tensor:
    """Mutation: one unit of every row from a class that can spare it to another class."""
    giver = torch.multinomial((children > 1).double(), 1, generator=generator)
    step = torch.randint(1, children.shape[1], giver.shape, generator=generator)
    taker = (giver + step) % children.shape[1]
    one = torch.ones_like(giver)
    return children.scatter_add(1, giver, -one).scatter_add(1, taker, one)
