"""Held against the true latents: their bins, and what the autoencoder makes of them."""

from __future__ import annotations

from typing import Any

import torch

from leakatlas.attacks.analytic.isolation.scale_mia import decode, encode, find_parts
from leakatlas.bench import examine as look
from leakatlas.bench.harness import Trial
from leakatlas.fl import Stage
from leakatlas.metrics.assignment import pairwise_mse
from leakatlas.metrics.images import psnr


def examine(trial: Trial, stage: Stage) -> dict[str, Any]:
    """Latents alone in their bin, those of them that were read, and the ceiling of the images."""
    model = trial.view.model
    x = stage.box.normalize(trial.truth.images.to(next(model.parameters())))
    parts = find_parts(model, x[:1])
    with torch.no_grad():
        z = torch.cat([encode(parts, part) for part in x.split(256)])
    bins = torch.bucketize(z.mean(dim=1), trial.view.key["thresholds"])
    single = (bins > 0) & ((bins[:, None] == bins).sum(dim=1) == 1)
    own = decode(z, trial.view.key, stage.box, tuple(x.shape[1:]))
    read = torch.zeros(len(x), dtype=torch.bool)
    if len(trial.images):
        # A candidate is an image's latent if it is that image's own reconstruction.
        read = pairwise_mse(trial.images.double(), own.double()).min(dim=0).values.sqrt() < 1e-3
    return {
        "alone": look.share(single),
        "read_of_alone": look.share(read[single]),
        "ceiling": psnr(own.double().clamp(0, 1), trial.truth.images.double()).tolist(),
    }
