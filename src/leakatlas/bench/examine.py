"""What the Python files of several studies look at in a trial, beyond its scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leakatlas.bench.harness import Trial
from leakatlas.blocks import readout
from leakatlas.errors import InvalidInput
from leakatlas.metrics.assignment import assign, pairwise_mse
from leakatlas.metrics.images import psnr_of_mse

EXACT = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Root mean square error, in pixels of [0, 1], below which an image counts as exact."""


def errors(trial: Trial) -> Tensor:
    """Root mean square error ``(N,)`` of every original, in pixels of [0, 1].

    Candidates are clipped and assigned one to one by squared error; an original without one has an
    infinite error.
    """
    truth = trial.truth.images.double()
    found = trial.images.double().clamp(0, 1)
    found = found[torch.isfinite(found.flatten(1)).all(dim=1)] if len(found) else found
    error = torch.full((len(truth),), torch.inf, dtype=torch.float64)
    if len(found) == 0:
        return error
    cost = pairwise_mse(found, truth)
    for original, candidate in enumerate(assign(cost).of_original):
        if candidate is not None:
            error[original] = cost[candidate, original].sqrt()
    return error


def reached(found: Tensor, truth: Tensor, *, null: Sequence[float]) -> list[float]:
    """PSNR in dB of every original, against the candidate that the best assignment gives it.

    Args:
        found: Candidates ``(M, C, H, W)`` in pixels of [0, 1], clipped here.
        truth: Originals ``(N, C, H, W)``.
        null: What an original without a candidate scores: the mean public image, held against it.
    """
    scores = list(null)
    cost = pairwise_mse(found.to(truth).clamp(0, 1), truth)
    for original, candidate in enumerate(assign(cost).of_original):
        if candidate is not None:
            scores[original] = float(psnr_of_mse(cost[candidate, original]))
    return scores


def exact(trial: Trial) -> Tensor:
    """Which originals ``(N,)`` came back exactly, by the precision of the candidates."""
    return errors(trial) < EXACT[trial.images.dtype]


def alone(h: Tensor, edges: Tensor) -> Tensor:
    """Which measurements ``(N,)`` have a bin to themselves.

    Args:
        h: Measurement of each example, ``(N,)``.
        edges: Rising lower edges of the bins; the last is the upper end of the top bin, which
            takes what lies beyond it as well.
    """
    open_edges = edges.to(h).clone()
    open_edges[-1] = torch.inf
    bins = torch.bucketize(h, open_edges)
    return (bins[:, None] == bins).sum(dim=1) == 1


def bins(trial: Trial, batch: int) -> dict[str, Any]:
    """The bins of an attack that sorts examples by one measurement, client by client.

    Args:
        trial: Of an attack whose key holds ``edges``, and ``w`` if it measures anything else than
            brightness.
        batch: Examples of one client; the truth holds one or several of such batches.

    Returns:
        ``alone``: which images have a bin of their client to themselves; ``exact_of_alone``: which
        of those came back exactly; ``expected_alone``: the share alone of independent measurements.

    Raises:
        InvalidInput: If the attack has no bins.
    """
    key, images = trial.view.key, trial.truth.images.flatten(1)
    if "edges" not in key:
        raise InvalidInput(f"The attack keeps no bins that could be looked at: {sorted(key)}.")
    h = images.to(key["w"]) @ key["w"] if "w" in key else images.double().mean(dim=1)
    single = torch.cat([alone(part, key["edges"]) for part in h.split(batch)])
    return {
        "alone": share(single),
        "exact_of_alone": share(exact(trial)[single]),
        "expected_alone": readout.expected_singletons(batch, len(key["edges"]) - 1) / batch,
    }


def share(hits: Tensor) -> list[float]:
    """Yes and no as numbers, one an original."""
    return [float(hit) for hit in hits]
