"""A report for a data protection impact assessment: context, one page, a comparison of defenses."""

from __future__ import annotations

import leakatlas
from leakatlas import FedAVG, data, defense, models

CONTEXT = {
    "purpose": "Training a classifier of photographs across three clinics",
    "controllers": ["Clinic A", "Clinic B", "Clinic C"],
    "processors": ["Aggregator Ltd."],
    "data": ["photographs", "diagnoses"],
    "people": ["patients"],
    "special_categories": True,
    "people_per_update": 2,
    "adversaries": {"C": "our aggregator", "G": "the aggregator, if its server is taken over"},
    "rounds": 20,
    "assessor": "the data protection officer",
    "expires": "2030-01-31",
}


def main(budget: str = "40s") -> leakatlas.Report:
    """Print ``leak-report/report.html`` from a browser: the first page is the summary."""
    photos = data.photos(16).subset([0, 1])
    noisy = defense("client_dp", unit="update", clip_norm=1.0, noise_multiplier=0.1)
    report = leakatlas.audit(
        models.build("fc", in_channels=3, size=16, classes=8, widths=[32]),
        (photos.images, photos.labels),
        protocol=FedAVG(epochs=1, batch_size=2, lr=0.01),
        alternatives={"clipping": [defense("clipping")], "noise": [noisy]},
        threat="C,G",
        attacks=["inverting_gradients", "robbing_the_fed"],
        attack_parameters={"inverting_gradients": {"steps": 50}},
        budget=budget,
        context=CONTEXT,
    )
    for letter, (deployed, _) in report.recovered().items():
        if deployed is not None:
            print(f"Adversary {letter} {deployed.in_words()}.")
    print(report.save("leak-report"))
    return report


if __name__ == "__main__":
    main()
