"""One attack whose decoder is learned before the clock starts, as the paper times it."""

from __future__ import annotations

from leakatlas.attacks.generative.direct.fgla import FGLA
from leakatlas.audit.rehearsed import Contest
from leakatlas.bench.cells import Cell
from leakatlas.bench.scene import public_images
from leakatlas.metrics.baselines import mean_image


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of every image, milliseconds an image, and DB of decoder and mean image."""
    contest, attack = Contest(cell), FGLA.tuned()
    contest.runs(attack)  # learns the decoder, or finds it kept
    runs = contest.runs(attack)
    return {
        "psnr": runs.psnr,
        "milliseconds": [1_000 * seconds / cell.case.batch for seconds in runs.cpu_seconds],
        "decoder_psnr": [found.notes["held_out_psnr"] for found in runs.found],
        "psnr_mean_image": contest.constant(mean_image(public_images(contest.stage)[0])),
    }
