"""How close the prior of a case can draw its victims."""

from __future__ import annotations

from typing import Any

from leakatlas import priors
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage
from leakatlas.priors import kept


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """DB of the best latent for every victim."""
    assert trial.found.recipe is not None
    prior = kept.decoder(trial.found.recipe.attack["parameters"]["prior"])
    truth = trial.truth
    pairs = zip(truth.images.float(), truth.labels, strict=True)
    return {
        "ceiling": [
            priors.inversion_psnr(prior, x[None], y[None] if prior.classes else None)
            for x, y in pairs
        ]
    }
