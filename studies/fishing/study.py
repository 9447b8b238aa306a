"""How alone the isolated example is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leakatlas.attacks.analytic.sparsification.fishing import find_head, head_names, survivors
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage, replay


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """How far the gradient of what is left is from the nearest example's own."""
    view, last = trial.view, trial.view.rounds[-1]
    model = view.model
    head = find_head(model, view)
    got = survivors(view, head, len(view.rounds) - 1)
    target = torch.tensor([int(last.key["move"][1])])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    best = torch.inf
    for image in stage.box.normalize(trial.truth.images.to(got.features)):
        own = replay.gradient(
            model, parameters, {}, image[None], target, loss=_logit, create_graph=False
        )
        names = [name for name in own if name not in head_names(head)]
        left = sum(float((got.gradient[name] - own[name]).square().sum()) for name in names)
        size = sum(float(own[name].square().sum()) for name in names)
        best = min(best, (left / size) ** 0.5)
    return {"isolation_error": best}


def _logit(logits: Tensor, y: Tensor) -> Tensor:
    """The logit of class y, whose gradient is that of an example with delta_y = +1."""
    return logits[:, int(y)].sum()
