"""Tokens held against the true ones; what the position term adds to the slope of the distance.

The squared distance holds the positions' gradient too, so the term adds no equation: it only weighs
them more. How much, the two slopes towards the image say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.attacks.analytic.closed_form.april import (
    find_front,
    label_of,
    solve_rows,
    token_system,
    tokens_of,
)
from leakatlas.bench.harness import Trial
from leakatlas.blocks import init, matching
from leakatlas.fl import Stage, View, stream

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-6}
"""Relative singular value below which a direction is rounding."""


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """The tokens where the closed form applies, the slopes where it was not used."""
    descends = "objective" in trial.found.notes
    direct = not descends and "token_rank" in trial.found.notes
    slopes = _slopes(trial.view, stage) if descends else None
    return {
        "token_error": [_token_error(trial)] if direct else [],
        "slope_ratio": [] if slopes is None else [float(slopes[0].norm() / slopes[1].norm())],
        "cosine_distance_term": [] if slopes is None else [_cosine(slopes[0], slopes[2])],
        "cosine_position_term": [] if slopes is None else [_cosine(slopes[1], slopes[2])],
    }


def _token_error(trial: Trial) -> float:
    view = trial.view
    front = find_front(view.model, view.input_shape)
    dtype = next(view.model.parameters()).dtype
    x = view.box.normalize(trial.truth.images.double())
    z, _ = tokens_of(view.model.double().eval(), x)
    a, b = token_system(view, front)
    found = solve_rows(a.T, b, TOLERANCE[dtype]).x
    return float((found - z).abs().max() / z.abs().max())


def _slopes(view: View, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Of the distance, of the position term, and the way to the image, at a random start."""
    g, y, replay = dict(view.update.tensors), label_of(view), view.replayer()
    name = find_front(view.model, view.input_shape).positions
    x = init.normal(view.batch_shape, generator=stream("april start"), like=g[name])
    mine = replay(x.requires_grad_(), y)
    towards = (x - stage.box.normalize(stage.victims[0].images)).detach()
    terms = (matching.squared_l2(mine, g), matching.subset(matching.cosine, [name])(mine, g))
    slopes = [torch.autograd.grad(term, x, retain_graph=True)[0] for term in terms]
    return slopes[0], slopes[1], towards


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
