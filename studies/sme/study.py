"""One network and one number of local steps a cell: both attacks rehearse, then meet all clients.

All times are CPU seconds of one thread. Each side rehearses the first variants that it declares on
photos of strangers, at the length of the run, and takes what served best there.
"""

from __future__ import annotations

from collections.abc import Mapping

from leakatlas.attacks.api import Attack
from leakatlas.attacks.optimization.basic.inverting_gradients import InvertingGradients
from leakatlas.attacks.optimization.basic.sme import SME
from leakatlas.audit.rehearsed import Contest
from leakatlas.bench.cells import Cell
from leakatlas.data import strangers
from leakatlas.metrics.baselines import mean_image

ITERATIONS = 80
LONG = 1_000
"""Iterations of the published setting; one takes no longer for more local steps."""

TRIED = 3
"""Variants that a rehearsal tries, each at full length on one batch."""

SIDES: Mapping[str, type[Attack]] = {"sme": SME, "replay": InvertingGradients}
LENGTHS = {"sme": {"sme": ITERATIONS, "long_sme": LONG}, "replay": {"replay": ITERATIONS}}


def measure(cell: Cell) -> dict[str, list[float]]:
    """DB of every image, CPU seconds of every client, and what each side chose."""
    contest = Contest(cell)
    public = strangers(contest.stage.victims[0])
    found = {"psnr_mean_image": contest.constant(mean_image(public.images))}
    for side, cls in SIDES.items():
        variants = dict(list(cls.variants().items())[:TRIED])
        best = contest.rehearsed(variants, public, iterations=ITERATIONS)
        found[f"rehearsal_cpu_seconds_{side}"] = [best.cpu_seconds]
        found[f"variant_{side}"] = [float(best.number)]
        for name, length in LENGTHS[side].items():
            runs = contest.runs(variants[best.name].lasting(length))
            found |= {f"psnr_{name}": runs.psnr, f"cpu_seconds_{name}": runs.cpu_seconds}
            if name == "long_sme":
                found["position"] = [made.notes["alpha"] for made in runs.found]
    for name in ("sme", "long_sme"):
        pairs = zip(found[f"psnr_{name}"], found["psnr_replay"], strict=True)
        found[f"{name}_minus_replay"] = [sme - replay for sme, replay in pairs]
    return found
