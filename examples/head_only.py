"""Head-only fine-tuning: the backbone is frozen, only the last layer's update leaves the client."""

from __future__ import annotations

import torch
from torch import nn

import leakatlas
from leakatlas import FedSGD, data


class Net(nn.Module):
    """A small network whose head is called ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(8 * 7 * 7, 8)
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, 8)``."""
        logits: torch.Tensor = self.fc(self.backbone(x))
        return logits


def main(budget: str = "20s") -> dict[str, leakatlas.Report]:
    """The same client twice: all parameters shared, and the head alone."""
    photos = data.photos(16).subset([0, 1])
    whole = Net()
    for parameter in whole.parameters():
        parameter.requires_grad_(True)
    reports = {}
    for name, model, shared in (("whole", whole, ("*",)), ("head only", Net(), ("fc.*",))):
        reports[name] = leakatlas.audit(
            model,
            (photos.images, photos.labels),
            protocol=FedSGD(shared=shared),
            threat="B",
            attacks=["inverting_gradients"],
            attack_parameters={"inverting_gradients": {"steps": 100}},
            budget=budget,
        )
        numbers = reports[name].diagnoses.values()
        shared_numbers = next(iter(numbers))["facts"]["shared parameters"]
        (found,) = reports[name].standings()
        print(f"{name}: {shared_numbers:,.0f} numbers shared, as deployed {found.deployed}")
    return reports


if __name__ == "__main__":
    main()
