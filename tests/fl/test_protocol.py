from __future__ import annotations

import pytest
import torch

from leakatlas.errors import InvalidParameter
from leakatlas.fl import FedAVG, FedSGD, task_loss


@pytest.mark.parametrize(
    ("examples", "epochs", "batch_size", "steps"),
    [(8, 1, 8, 1), (8, 2, 4, 4), (7, 2, 3, 6), (1, 5, 8, 5), (9, 1, 8, 2)],
)
def test_local_steps_count_the_short_last_batch(
    examples: int, epochs: int, batch_size: int, steps: int
) -> None:
    assert FedAVG(epochs=epochs, batch_size=batch_size).steps(examples) == steps


def test_fedsgd_takes_one_step_whatever_the_batch() -> None:
    assert FedSGD().steps(1) == FedSGD().steps(1000) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("momentum", 1.0),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("weight_decay", -1e-4),
        ("optimizer", "lion"),
        ("mode", "test"),
    ],
)
def test_fedavg_refuses(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=rf"FedAVG\({name}="):
        FedAVG(**{name: value})  # type: ignore[arg-type]  # invalid on purpose


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("reduction", "max"), ("mode", "x")])
def test_fedsgd_refuses(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=rf"FedSGD\({name}="):
        FedSGD(**{name: value})  # type: ignore[arg-type]  # invalid on purpose


def test_task_loss_is_the_mean_or_sum_of_negative_log_probabilities() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 2])
    by_hand = -torch.log(logits.exp() / logits.exp().sum(1, keepdim=True))[[0, 1], y]
    assert torch.allclose(task_loss(logits, y), by_hand.mean(), rtol=0, atol=1e-14)
    assert torch.allclose(task_loss(logits, y, "sum"), by_hand.sum(), rtol=0, atol=1e-14)


def test_probabilities_that_are_certain_are_labels() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    soft = torch.nn.functional.one_hot(y, 3).to(logits.dtype)
    assert torch.allclose(task_loss(logits, y), task_loss(logits, soft), rtol=0, atol=1e-14)
