"""What adversaries that hold the defense reach.

The adversary rehearses once for a network and a defense, on its public images, and then attacks
every client; oblivious, it runs the same variant and compares with the plain replay.
"""

from __future__ import annotations

from typing import Any

from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.audit.rehearsed import Contest
from leakatlas.bench import looks
from leakatlas.bench.cells import Cell

ITERATIONS = 60


def measure(cell: Cell) -> dict[str, Any]:
    """DB of every client's image under each adversary."""
    contest = Contest(cell)
    surrogate, held = contest.views[0].surrogate, zip(contest.clients, contest.views, strict=True)
    best = contest.rehearsed(InvertingGradients.variants(), surrogate, iterations=ITERATIONS)
    pairs = [looks.uploads(view, contest.stage, client) for client, view in held]
    return {
        "psnr_rehearsed": contest.runs(best.attack).psnr,
        "psnr_oblivious": contest.runs(best.attack, without="defenses").psnr,
        "psnr_mean_image": contest.constant(surrogate.images.mean(0)),
        "relative_error": [looks.distance(pair) for pair in pairs],
    }
