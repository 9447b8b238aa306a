"""The image that SEER is after, by its own criterion, and how near the reconstruction comes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leakatlas.attacks.analytic.isolation.seer import in_own_batch
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage
from leakatlas.metrics.images import psnr

SUCCESS = 19.0
"""PSNR in dB above which the paper calls an image recovered."""


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """The wanted image against what came out and against two guesses."""
    key, every = trial.view.key, trial.truth.images
    batches = every.unflatten(0, (stage.scenario.clients, -1))
    brightness = in_own_batch(batches.flatten(2).mean(dim=2)).flatten()
    wanted = int(brightness.argmax())
    guess = key["b"].reshape(every.shape[1:])
    found = trial.images[0] if len(trial.images) else guess
    gaps = (found.clamp(0, 1) - every).square().flatten(1).sum(dim=1)
    got, null = _psnr(found, every[wanted]), _psnr(guess, every[wanted])
    one = [] if "threshold" not in key else [float((brightness > key["threshold"]).sum() == 1)]
    return {
        "psnr_of_wanted": got,
        "wanted_over_guess": got - null,
        "success": float(got > SUCCESS),
        "guess_psnr": null,
        "guess_success": float(null > SUCCESS),
        "mean_psnr": _psnr(every.mean(dim=0), every[wanted]),
        "nearest_is_wanted": float(int(gaps.argmin()) == wanted),
        "one_passes": one,
        "psnr_where_one_passes": [got] if one == [1.0] else [],
    }


def _psnr(image: Tensor, wanted: Tensor) -> float:
    return float(psnr(image.clamp(0, 1)[None].double(), wanted[None].double())[0])
