"""Your own model, images and protocol: who sees what in one round of federated averaging."""

from __future__ import annotations

import torch
from torch import nn

import leakatlas
from leakatlas import FedAVG, data


def make_model() -> nn.Module:
    """Any module that takes images ``(N, C, H, W)`` and returns logits ``(N, K)``."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 7 * 7, 8)
    )


def main(budget: str = "20s") -> leakatlas.Report:
    """Audit two photos; put your own images in [0, 1] and their labels in their place."""
    photos = data.photos(16).subset([0, 1])
    report = leakatlas.audit(
        make_model(),
        (photos.images, photos.labels),
        protocol=FedAVG(epochs=1, batch_size=2, lr=0.01),
        threat="C,G",  # an eavesdropper who knows the training, and a malicious server
        attacks=["inverting_gradients", "robbing_the_fed"],
        attack_parameters={"inverting_gradients": {"steps": 50}},
        budget=budget,
    )
    for found in report.standings():
        print(f"{found.letter}: as deployed {found.deployed}, upper bound {found.bound}")
    print(report.save("leak-report"))
    return report


if __name__ == "__main__":
    main()
