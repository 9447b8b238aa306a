"""The two learning algorithms of the tables, as data: FedSGD and FedAVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from leakatlas.fl.augmentation import AugmentField
from leakatlas.fl.losses import PLAIN, LossField
from leakatlas.params import Configured, NonNegative, Positive, PositiveInt

Mode = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class FedSGD(Configured):
    """One gradient per client and round.

    Args:
        lr: Server step size on the averaged gradient.
        reduction: Whether the client sends the mean or the sum over its examples.
        mode: Mode of BN and dropout during the client's forward pass.
        loss: What the client minimises; see :mod:`leakatlas.fl.losses`.
        shared: Which parameters and buffers leave the client; see :mod:`leakatlas.fl.sharing`.
        augment: What it does to its images; see :mod:`leakatlas.fl.augmentation`.
    """

    lr: Positive = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    mode: Mode = "eval"
    loss: LossField = PLAIN
    shared: tuple[str, ...] = ("*",)
    augment: AugmentField = ()

    def steps(self, examples: int) -> int:
        """Local steps per round: always 1."""
        del examples
        return 1


@dataclass(frozen=True, kw_only=True)
class FedAVG(Configured):
    """Several local steps, then the weight delta (after - before) is sent.

    Args:
        epochs: Local epochs E.
        batch_size: Local batch size B; the last batch of an epoch may be smaller.
        lr: Local learning rate eta.
        optimizer: Local optimizer; state starts fresh every round.
        momentum: SGD momentum.
        betas: Adam's moment decays.
        weight_decay: L2 penalty added to the gradient.
        shuffle: Whether examples are reordered every epoch; the order is unknown to the
            adversary unless ``Grant.BATCH_ORDER`` is given.
        mode: Mode of BN and dropout during local training.
        loss: What the client minimises; see :mod:`leakatlas.fl.losses`.
        shared: Which parameters and buffers leave the client; see :mod:`leakatlas.fl.sharing`.
        augment: What it does to its images; see :mod:`leakatlas.fl.augmentation`.
    """

    epochs: PositiveInt = 1
    batch_size: PositiveInt = 8
    lr: Positive = 0.01
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    weight_decay: NonNegative = 0.0
    shuffle: bool = False
    mode: Mode = "train"
    loss: LossField = PLAIN
    shared: tuple[str, ...] = ("*",)
    augment: AugmentField = ()

    def steps(self, examples: int) -> int:
        """Local steps per round, T = E * ceil(N / B)."""
        return self.epochs * -(-examples // self.batch_size)


Protocol = FedSGD | FedAVG

PROTOCOLS: dict[str, type[FedSGD] | type[FedAVG]] = {"fedsgd": FedSGD, "fedavg": FedAVG}


def task_loss(logits: Tensor, y: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Softmax cross-entropy, the loss of every row of the tables.

    Args:
        logits: ``(N, K)``.
        y: Class indices ``(N,)`` (int64), or class probabilities ``(N, K)``.
        reduction: Over the N examples.
    """
    return F.cross_entropy(logits, y, reduction=reduction)
