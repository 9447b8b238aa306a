r"""Labels and features of a small batch at once: the factors of the head's gradient.

With mean-reduced cross-entropy over B samples, features :math:`h_i` that enter a linear head, and
:math:`\delta_i = \mathrm{softmax}(W h_i + b) - e_{y_i}`, the head's gradient is, exactly,

.. math:: [G \mid g] = \frac1B \sum_i \delta_i\, [h_i \mid 1]^\top .

It has rank B where B < K and :math:`\delta, h` are in general position, and its row space then is
the span of the :math:`[h_i \mid 1]`: in it, the features are B points of an affine space of
dimension B - 1. That leaves B (B - 1) numbers for K B equations, so for every multiset of labels
that the bias gradient allows (:math:`n_c \ge -B g_c`, since probabilities are not negative) a
damped Gauss-Newton iteration seeks features that explain the gradient. Wrong labels leave a
residual, the right ones leave rounding: the answer certifies itself, on a trained network as on a
fresh one. No mean probability is guessed, and no public data are needed.

Exact: gradients of one step of plain cross-entropy, through any body of the network, B < K, no more
features than the head has inputs, and no sample that is fitted down to the rounding of the others'.
Fails, and says so (``settled`` is False): updates of several local steps, noisy, pruned or
quantised ones, whose residual no labels bring to rounding; and refuses B >= K, where the rank says
nothing, batches beyond :data:`LARGEST`, and label sets too many to try.

Ours. That the rank counts and spans what a batch shows is the observation of RLG
(:mod:`~leakatlas.blocks.labels.rank`); that mean features stand in the quotients of the head's
gradients is iLRG's, and starts the iteration here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.blocks.labels import _checks
from leakatlas.blocks.labels.equations import class_embeddings
from leakatlas.errors import InvalidInput

EXPLAINED = 1e-4
"""Residual, relative to the gradient's norm, below which labels explain a gradient in float32: the
right ones leave 1e-7, or 1e-5 where all samples are fitted well."""

APART = 30.0
"""The best other labels leave so many times as much, or neither is certain."""

LARGEST = 6
"""Samples beyond which descent does not find the right features from these starts: all batches of
four of three trained networks, three in four of six, none of eight."""

MOST = 5_000
"""Multisets of labels that are tried at most."""

TRIED = 24
"""Multisets that are tried from several starts."""

BRIEF, LONG = 12, 60
"""Iterations for every multiset, and for those left."""

ROUNDS = 8
"""Rounds of :data:`STARTS` starts each, while nothing explains the gradient."""

STARTS = 4
OFF = (0.1, 0.5, 1.0, 2.0)
"""How far starts are off the mean feature that a class saw, in units of the spread of these."""


@dataclass(frozen=True, kw_only=True)
class Factored:
    """The labels that explain a head's gradient best.

    Args:
        counts: Class counts ``(K,)`` int64.
        residual: What they leave unexplained, relative to the gradient's norm.
        runner_up: What the best other labels leave; infinity where there are none.
    """

    counts: Tensor
    residual: float
    runner_up: float

    @property
    def settled(self) -> bool:
        """Whether these labels, and no others, explain the gradient."""
        return self.residual < EXPLAINED and self.residual * APART < self.runner_up


def factored(
    weight_grad: Tensor,
    bias_grad: Tensor,
    weight: Tensor,
    bias: Tensor,
    batch_size: int,
    *,
    generator: torch.Generator,
) -> Factored:
    """Labels and features that explain the gradient of a linear head.

    Args:
        weight_grad: Mean-reduced gradient of the head's weight ``(K, D)``.
        bias_grad: That of its bias ``(K,)``.
        weight: The head's weight ``(K, D)``.
        bias: Its bias ``(K,)``.
        batch_size: B, at most K - 1, D and :data:`LARGEST`.
        generator: Of the starts, on the CPU.

    Raises:
        InvalidInput: If B is out of its range, the gradient is zero, or too many label sets fit.
    """
    _checks.matrix("factored", weight_grad)
    _checks.batch("factored", batch_size)
    K, D = weight_grad.shape
    largest = min(K - 1, D, LARGEST)
    if batch_size > largest:
        raise InvalidInput(
            f"factored: takes batches of up to {largest} samples at a head of {K} classes and {D} "
            f"features, got {batch_size}; use a counting rule."
        )
    problem = Problem.of(weight_grad, bias_grad, weight, bias, batch_size)
    labels = allowed(bias_grad, batch_size)
    brief = problem.residuals(labels, starts=1, iterations=BRIEF, generator=generator)
    left = brief.argsort(stable=True)[:TRIED]
    found = brief[left]
    for _ in range(ROUNDS):
        again = problem.residuals(labels[left], starts=STARTS, iterations=LONG, generator=generator)
        found = torch.minimum(found, again)
        if float(found.min()) < EXPLAINED:
            break
    order = found.argsort(stable=True)
    best = labels[left[order[0]]]
    return Factored(
        counts=torch.bincount(best, minlength=K).to(weight_grad.device),
        residual=float(found[order[0]]),
        runner_up=float(found[order[1]]) if len(order) > 1 else float("inf"),
    )


def allowed(bias_grad: Tensor, batch_size: int) -> Tensor:
    """Multisets of labels ``(S, B)`` with ``n_c >= -B g_c``, each ascending.

    Raises:
        InvalidInput: If there are more than :data:`MOST`.
    """
    least = (-batch_size * bias_grad.detach().double().cpu() - 1e-3).ceil().clamp(min=0).long()
    free = batch_size - int(least.sum())
    if free < 0:  # no gradient of plain cross-entropy: take the likeliest, which explain nothing
        least, free = torch.zeros_like(least), batch_size
    sure = torch.repeat_interleave(torch.arange(len(least)), least).tolist()
    every = itertools.combinations_with_replacement(range(len(least)), free)
    rows = [sorted((*sure, *more)) for more in itertools.islice(every, MOST + 1)]
    if len(rows) > MOST:
        raise InvalidInput(
            f"factored: more than {MOST:,} sets of {batch_size} labels fit this gradient; use a "
            "counting rule."
        )
    return torch.tensor(rows, dtype=torch.int64)


@dataclass(frozen=True)
class Problem:
    r"""The factorisation in the coordinates of the row space.

    With an orthonormal basis V of the row space ``(D + 1, B)``, features are :math:`[h_i | 1] = V
    m_i` and :math:`v^\top m_i = 1` for the last row v of V. All tensors are float64 on the CPU.

    Args:
        target: ``B [G | g] V``, ``(K, B)``.
        head: ``[W | b] V``, ``(K, B)``.
        origin: The point of least norm with ``v m = 1``, ``(B,)``.
        along: Orthonormal directions along which ``v m`` stays 1, ``(B, B - 1)``.
        embedded: Mean feature that each class saw, in these coordinates ``(K, B - 1)``.
    """

    target: Tensor
    head: Tensor
    origin: Tensor
    along: Tensor
    embedded: Tensor

    @classmethod
    def of(
        cls, weight_grad: Tensor, bias_grad: Tensor, weight: Tensor, bias: Tensor, batch_size: int
    ) -> Problem:
        """From the tensors of the head.

        Raises:
            InvalidInput: If the gradient is zero.
        """
        held = (weight_grad, bias_grad, weight, bias)
        G, g, W, b = (part.detach().double().cpu() for part in held)
        gradient = torch.cat([G, g[:, None]], 1)
        basis = torch.linalg.svd(gradient, full_matrices=False).Vh[:batch_size].T
        v = basis[-1]
        if float(v.norm()) == 0:
            raise InvalidInput("factored: the bias gradient is zero, so the update shows no label.")
        start = torch.cat([v[:, None], torch.eye(batch_size, dtype=v.dtype)], 1)
        along = torch.linalg.qr(start).Q[:, 1:batch_size]
        features = torch.cat([class_embeddings(G, g), torch.ones_like(g)[:, None]], 1)
        origin = v / v.square().sum()
        return cls(
            target=batch_size * gradient @ basis,
            head=torch.cat([W, b[:, None]], 1) @ basis,
            origin=origin,
            along=along,
            embedded=(features @ basis - origin) @ along,
        )

    def residuals(
        self, labels: Tensor, *, starts: int, iterations: int, generator: torch.Generator
    ) -> Tensor:
        """What each multiset ``(S, B)`` leaves unexplained at best, relative to the norm, ``(S,)``.

        Args:
            labels: Multisets.
            starts: Independent starts: the first from what each class saw, the others off it.
            iterations: Of damped Gauss-Newton.
            generator: Of the starts.
        """
        best = torch.full((len(labels),), torch.inf, dtype=torch.float64)
        spread = (self.embedded - self.embedded.mean(dim=0)).square().mean(dim=0).sqrt()
        for start in range(starts):
            t = self.embedded[labels]
            # Equal labels must not start at one point: they would stay there.
            off = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            t = t + OFF[start % len(OFF)] * spread * off
            best = torch.minimum(best, self.descend(t, labels, iterations))
        relative: Tensor = best.sqrt() / self.target.norm()
        return relative

    def descend(self, t: Tensor, labels: Tensor, iterations: int) -> Tensor:
        """The squared residual ``(S,)`` that Levenberg-Marquardt reaches from ``t``."""
        S = len(labels)
        one_hot = F.one_hot(labels, len(self.target)).double()
        damping = torch.full((S,), 1e-2, dtype=torch.float64)
        residual, slopes = self.explained(t, one_hot)
        cost = residual.square().sum((1, 2))
        for _ in range(iterations):
            J = slopes.flatten(3).flatten(1, 2)  # (S, K B, B (B - 1))
            normal = J.mT @ J
            downhill = J.mT @ residual.reshape(S, -1, 1)
            scale = normal.diagonal(dim1=1, dim2=2) + 1e-12
            damped = normal + torch.diag_embed(damping[:, None] * scale)
            step = torch.linalg.solve(damped, downhill)
            tried = t - step.reshape(t.shape)
            new_residual, new_slopes = self.explained(tried, one_hot)
            new_cost = new_residual.square().sum((1, 2))
            better = new_cost < cost
            cost = torch.where(better, new_cost, cost)
            t = torch.where(better[:, None, None], tried, t)
            residual = torch.where(better[:, None, None], new_residual, residual)
            slopes = torch.where(better[:, None, None, None, None], new_slopes, slopes)
            damping = torch.where(better, damping * 0.3, damping * 4).clamp(1e-9, 1e9)
        return cost

    def explained(self, t: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Residual ``(S, K, B)`` and its slopes by ``t``, ``(S, K, B, B, B - 1)``.

        Args:
            t: Features along the affine space ``(S, B, B - 1)``.
            one_hot: Labels ``(S, B, K)``.
        """
        m = self.origin + t @ self.along.T  # (S, B, B)
        p = (m @ self.head.T).softmax(2)  # (S, B, K)
        delta = p - one_hot
        residual = torch.einsum("sik,sij->skj", delta, m) - self.target
        head = self.head @ self.along  # logits by t
        by_t = p[..., None] * (head - torch.einsum("sik,kq->siq", p, head)[:, :, None])
        slopes = torch.einsum("sikq,sij->skjiq", by_t, m)
        slopes = slopes + torch.einsum("sik,jq->skjiq", delta, self.along)
        return residual, slopes
