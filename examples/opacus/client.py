"""A client that trains with Opacus: what DP-SGD releases, captured, audited and accounted for."""

from __future__ import annotations

import warnings

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import leakatlas
from leakatlas import FedSGD, data
from leakatlas.fl.state import model_state
from leakatlas.integrations.opacus import capture_release, formal

EXAMPLES, DELTA = 2, 1e-5


def make_model() -> nn.Module:
    """The agreed architecture."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.ReLU(), nn.Linear(32, 8))


def main(noise: float = 1.0, budget: str = "20s") -> leakatlas.Report:
    """One step of DP-SGD, attacked as it leaves the client.

    Args:
        noise: Noise multiplier; 0 clips alone.
        budget: Of the audit.
    """
    photos = data.photos(16).subset(range(EXAMPLES))
    model = make_model()
    received = model_state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus: no cryptographic generator for an example
        # Without subsampling the default, numerical accountant would divide by zero.
        engine = PrivacyEngine(accountant="rdp")
        private, optimizer, _ = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(
                TensorDataset(photos.images, photos.labels), batch_size=EXAMPLES
            ),
            noise_multiplier=noise,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
        with capture_release(optimizer) as release:
            F.cross_entropy(private(photos.images), photos.labels).backward()
            optimizer.step()
    spent = formal(engine, delta=DELTA) if noise else None
    captured = release.capture(private, examples=EXAMPLES, received=received, spent=spent)
    report = leakatlas.audit(
        make_model(),
        (photos.images, photos.labels),
        captured=captured,
        protocol=FedSGD(),
        threat="B",
        attacks=["inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 100}},
        budget=budget,
    )
    for note in captured.notes:
        print(note)
    for found in report.verdicts():
        print(f"{found.letter}: {found.verdict}")
    return report


if __name__ == "__main__":
    main()
