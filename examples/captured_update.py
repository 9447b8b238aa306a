"""An update that a real system recorded, attacked without the private images.

Any framework that shows the arrays before and after local training will do: Flower hands them out
in this form, as lists in the order of ``state_dict()``.
"""

from __future__ import annotations

import torch
from torch import nn

import leakatlas
from leakatlas import FedAVG, data
from leakatlas.fl import Update


def make_model() -> nn.Module:
    """The architecture that client and server agreed on."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.ReLU(), nn.Linear(32, 8))


def a_recorded_round(lr: float) -> tuple[list[object], list[object]]:
    """What your framework would give you: the arrays before and after one client's step."""
    model, photos = make_model(), data.photos(16).subset([0])
    before = [tensor.numpy().copy() for tensor in model.state_dict().values()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    nn.functional.cross_entropy(model(photos.images), photos.labels).backward()
    optimizer.step()
    return before, [tensor.numpy().copy() for tensor in model.state_dict().values()]


def main(budget: str = "20s") -> leakatlas.Report:
    """Attack the recorded update; nothing is scored, since the images stay with the client."""
    model = make_model()
    before, after = a_recorded_round(lr=0.1)
    update = Update.from_arrays(before, after, model, num_examples=1)
    report = leakatlas.audit(
        model,
        captured=update,
        input_shape=(3, 16, 16),
        protocol=FedAVG(epochs=1, batch_size=1, lr=0.1),
        threat="C",
        attacks=["rgap", "inverting_gradients"],
        attack_parameters={"inverting_gradients": {"steps": 50}},
        budget=budget,
    )
    for run in report.runs:
        print(f"{run.attack}: {run.status}, {run.verdict}, confidence {run.confidence}")
    print(report.save("leak-report"))
    return report


if __name__ == "__main__":
    main()
