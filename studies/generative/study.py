"""Inverting Gradients as it rehearsed, and how close the prior can draw a victim at all."""

from __future__ import annotations

from leakatlas import priors
from leakatlas.audit.rehearsed import rehearsed as choose
from leakatlas.bench import scene
from leakatlas.bench.cells import Cell
from leakatlas.priors import kept

PRIOR = "generator-cifar10"


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of the best latent for every victim; no search among the prior's pictures goes beyond."""
    victims = scene.victims(cell)
    prior = kept.decoder(PRIOR)
    return {
        "psnr": [priors.inversion_psnr(prior, x[None]) for x in victims.with_channels(3).images]
    }


__all__ = ["choose", "measure"]
