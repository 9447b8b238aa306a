"""A client as somebody describes it, and how far what it sent is from that description."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakatlas.data import Box
from leakatlas.errors import LeakAtlasError
from leakatlas.fl import Defense, FedAVG, Protocol, Update, replay
from leakatlas.fl.augmentation import augmented
from leakatlas.fl.draws import Draws
from leakatlas.fl.state import trained

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest relative residual that rounding explains, by dtype of the update."""

ADAM_TOLERANCE = 0.1
"""The same for Adam below float64: it divides by the gradient's size, so that units whose gradient
is pure rounding error move by a full step."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A client as somebody describes it, and what it sent.

    Args:
        model: Holding the state that it received.
        update: A gradient or a delta.
        x: Its inputs, model space.
        y: Its targets.
        protocol: What it ran.
        order: Example indices of every local step, if known.
        drawn: What its model drew in every local step, if known.
        defenses: Whose mirrors are applied.
        seeds: Of its transforms in every local step, if known.
        box: The pixel space that they act in.
        weight_decay: L2 penalty in a single gradient, which no protocol describes.
        clients: Who hold equal parts of the batch, one after the other, and whose mean was seen.
        loose: A residual that counts as none, beyond what rounding explains.
    """

    model: nn.Module
    update: Update
    x: Tensor
    y: Tensor
    protocol: Protocol
    order: Sequence[Tensor] | None = None
    drawn: Sequence[Draws] | None = None
    defenses: tuple[Defense, ...] = ()
    seeds: Sequence[int] | None = None
    box: Box | None = None
    weight_decay: float = 0.0
    clients: int = 1
    loose: float = 0.0

    def _augment(self, x: Tensor, step: int) -> Tensor:
        assert self.seeds is not None
        return augmented(x, self.protocol.augment, self.seeds[step], self.box)

    def send(self, *, new: bool = False) -> dict[str, Tensor]:
        """What this client sends.

        Args:
            new: Whether its model draws anew, where nothing was recorded.
        """
        self.model.train(self.protocol.mode == "train")
        run = replay.client(
            self.model, self.protocol, self.update,
            defenses=self.defenses,
            order=self.order,
            augment=self._augment if self.seeds else None,
            drawn=self.drawn if self.drawn is not None else ("new" if new else "mean"),
        )  # fmt: skip
        size = len(self.x) // self.clients
        parts = [run(x, y) for x, y in zip(self.x.split(size), self.y.split(size), strict=True)]
        sent = {
            name: torch.stack([part[name].detach() for part in parts]).mean(0)
            if len(parts) > 1
            else tensor.detach()
            for name, tensor in parts[0].items()
        }
        if self.weight_decay:
            named, factor = trained(self.model), self.update.sign * self.update.scale
            penalty = self.weight_decay * factor
            sent = {n: t + penalty * named[n].detach() for n, t in sent.items()}
        return sent


@dataclass(frozen=True)
class Residual:
    """How far an update is from a description.

    Args:
        plain: Relative distance.
        scaled: The same after the best common factor.
        factor: That factor.
    """

    plain: float
    scaled: float
    factor: float


def with_protocol(described: Described, **changes: Any) -> Described:
    """The same client under another protocol."""
    return replace(described, protocol=replace(described.protocol, **changes))


def relative_residual(simulated: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> float:
    """``|simulated - observed| / |observed|`` over the observed tensors; 0/0 is 0."""
    difference = sum(float((simulated[n] - t).double().square().sum()) for n, t in observed.items())
    size = sum(float(t.double().square().sum()) for t in observed.values())
    return float((difference / size) ** 0.5) if size > 0 else float(difference > 0)


def residual_of(described: Described) -> Residual:
    """How far the update is from what this client sends."""
    sent, observed = described.send(), described.update.tensors
    inner = sum(float((sent[n] * t).double().sum()) for n, t in observed.items())
    size = sum(float(sent[n].double().square().sum()) for n in observed)
    factor = inner / size if size > 0 else 1.0
    return Residual(
        relative_residual(sent, observed),
        relative_residual({n: t * factor for n, t in sent.items()}, observed),
        factor,
    )


def rounding_of(described: Described) -> float:
    """How far single precision takes what this client sends from double precision, relatively.

    Well-behaved training stays within 1e-5. A large step on a few examples with batch normalisation
    moves by a tenth: which units fire then hangs on the last digit. 0 where nobody can tell.
    """
    if described.defenses or precision(described.update.tensors) == torch.float64:
        return 0.0
    x, y = (t.double() if t.is_floating_point() else t for t in (described.x, described.y))
    doubled = replace(described, model=copy.deepcopy(described.model).double(), x=x, y=y)
    try:
        return relative_residual(described.send(), doubled.send())
    except (LeakAtlasError, ValueError, RuntimeError, IndexError):
        return 0.0  # a model that runs in one precision only


def tolerance_of(described: Described) -> float:
    """The largest residual that rounding explains, or that counts as none."""
    dtype = precision(described.update.tensors)
    protocol = described.protocol
    adam = isinstance(protocol, FedAVG) and protocol.optimizer == "adam"
    tolerance = max(TOLERANCE.get(dtype, 1e-3), described.loose)
    return max(tolerance, ADAM_TOLERANCE) if adam and dtype != torch.float64 else tolerance


def precision(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype whose rounding these values bear, which may be coarser than that they came in."""
    dtype = next(iter(tensors.values())).dtype
    for coarse in (torch.float16, torch.bfloat16):
        if all(torch.equal(t.to(coarse).to(t.dtype), t) for t in tensors.values()):
            return coarse
    return dtype


def attempted(changed: Described) -> Residual | None:
    """How far the update is from a description; None if no client can carry it out."""
    try:
        return residual_of(changed)
    except (LeakAtlasError, ValueError, RuntimeError, IndexError):
        return None  # a description that this client cannot even carry out explains nothing
