"""What every rule asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from leakatlas.errors import InvalidInput


def vector(who: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a non-empty vector."""
    if value.ndim != 1 or value.numel() == 0:
        raise InvalidInput(f"{who}: {name} must be (K,), got {tuple(value.shape)}.")


def matrix(who: str, weight_grad: Tensor) -> None:
    """Raise unless ``weight_grad`` is a non-empty matrix."""
    if weight_grad.ndim != 2 or weight_grad.numel() == 0:
        raise InvalidInput(f"{who}: weight_grad must be (K, D), got {tuple(weight_grad.shape)}.")


def batch(who: str, batch_size: int) -> None:
    """Raise unless there is at least one sample."""
    if batch_size < 1:
        raise InvalidInput(f"{who}: batch_size must be positive, got {batch_size}.")
