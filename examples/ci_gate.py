"""A gate for continuous integration: the build fails if too much can be recovered.

``leakatlas audit audit.yaml --fail-on 'P(psnr > 20 dB) > 0.05'`` does the same from a shell.
"""

from __future__ import annotations

import sys

import leakatlas
from leakatlas import FedAVG, data, defense, models
from leakatlas.errors import Undecided

CONDITION = "P(psnr > 20 dB) > 0.05"


def main(noise: float = 0.5, budget: str = "20s") -> int:
    """Exit code: 0 fine, 1 the condition holds, 3 too little ran for an answer."""
    photos = data.photos(16).subset([0, 1])
    report = leakatlas.audit(
        models.build("fc", in_channels=3, size=16, classes=8, widths=[32]),
        (photos.images, photos.labels),
        protocol=FedAVG(epochs=1, batch_size=2, lr=0.01),
        defenses=[defense("client_dp", unit="update", clip_norm=1.0, noise_multiplier=noise)],
        threat="C",
        attacks=["inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 50}},
        budget=budget,
    )
    report.save("leak-report")
    try:
        failed = report.exceeds(CONDITION)
    except Undecided as problem:
        print(problem)
        return 3
    print(f"{CONDITION}: {'holds, the build fails' if failed else 'does not hold on what ran'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
