"""The message of a client: named tensors whose meaning is written on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from leakatlas import reading, tensorfiles
from leakatlas.errors import InvalidInput, InvalidParameter, shown
from leakatlas.params import Configured, Positive, PositiveInt

Kind = Literal["gradient", "delta", "weights"]


@dataclass(frozen=True, kw_only=True)
class _Facts(Configured):
    """What a file says of an update besides its tensors; see :class:`Update`."""

    kind: Kind
    state_hash: str
    num_examples: PositiveInt
    sign: Literal[1, -1]
    scale: Positive
    reduction: Literal["mean", "sum"]
    clients: PositiveInt
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Update:
    """What was sent, and what it means.

    ``tensors[name] = sign * scale * quantity[name]``, where the quantity is the loss gradient
    (``gradient``), ``after - before`` (``delta``), or the weights after training (``weights``).

    Args:
        tensors: By parameter name, never by position; private parameters are absent.
        kind: The quantity.
        state_hash: Hash of the exact model state at which it was computed.
        num_examples: Examples behind it; FL clients send it as their aggregation weight.
        sign: +1 or -1.
        scale: Positive factor on the quantity.
        reduction: Over examples, for gradients.
        buffers_before: Buffers that the client received (BN running statistics).
        buffers_after: Buffers after local training; empty if none were sent.
        clients: How many clients were averaged into it.
    """

    tensors: Mapping[str, Tensor]
    kind: Kind
    state_hash: str
    num_examples: int
    sign: Literal[1, -1] = 1
    scale: float = 1.0
    reduction: Literal["mean", "sum"] = "mean"
    buffers_before: Mapping[str, Tensor] = field(default_factory=dict)
    buffers_after: Mapping[str, Tensor] = field(default_factory=dict)
    clients: int = 1

    def quantity(self) -> dict[str, Tensor]:
        """The tensors with sign and scale undone."""
        factor = 1.0 / (self.sign * self.scale)
        return {name: tensor * factor for name, tensor in self.tensors.items()}

    def gradient(self, *, lr: float | None = None, steps: int = 1) -> dict[str, Tensor]:
        """The mean gradient, or its FedAVG stand-in ``(before - after) / (lr * steps)``.

        Args:
            lr: Local learning rate, needed for a delta.
            steps: Local steps T behind a delta.

        Raises:
            InvalidInput: For a delta without ``lr``, and for bare weights.
        """
        quantity = self.quantity()
        if self.kind == "gradient":
            examples = self.num_examples if self.reduction == "sum" else 1
            return {name: tensor / examples for name, tensor in quantity.items()}
        if self.kind == "delta" and lr is not None:
            return {name: tensor / (-lr * steps) for name, tensor in quantity.items()}
        raise InvalidInput(
            f"A gradient cannot be read from an update of kind {self.kind!r} "
            f"with lr={lr}: a delta needs the local learning rate, weights need the state before."
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Update:
        """The same message with other tensors."""
        return replace(self, tensors=dict(tensors))

    def check(self) -> Update:
        """This update, if every tensor is finite and not empty.

        Raises:
            InvalidInput: Otherwise, naming the tensor.
        """
        if not self.tensors:
            raise InvalidInput("The update holds no tensors.")
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point() or tensor.element_size() == 1:
                raise InvalidInput(f"Update tensor {name!r} is {tensor.dtype}, expected floats.")
            if bad := tensorfiles.count_non_finite(tensor):
                raise InvalidInput(
                    f"Update tensor {name!r} has {bad} non-finite of {tensor.numel()} values; "
                    "the client's training diverged or the message was damaged."
                )
        return self

    def check_fits(self, parameters: Mapping[str, Tensor]) -> Update:
        """This update, if it belongs to a model with these parameters.

        Raises:
            InvalidInput: If a name is unknown or a shape differs.
        """
        for name, tensor in self.tensors.items():
            if name not in parameters:
                raise InvalidInput(
                    f"The update has a tensor {name!r} that the model lacks; "
                    f"the model has: {', '.join(sorted(parameters))}."
                )
            if tensor.shape != parameters[name].shape:
                raise InvalidInput(
                    f"Update tensor {name!r} has shape {tuple(tensor.shape)}, the model's "
                    f"parameter has {tuple(parameters[name].shape)}."
                )
        return self

    def pack(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors and plain facts, for a file of the caller's choice."""
        tensors: dict[str, Tensor] = {}
        for group, content in (
            ("tensors", self.tensors),
            ("before", self.buffers_before),
            ("after", self.buffers_after),
        ):
            tensors.update({f"{group}/{k}": v.detach().contiguous() for k, v in content.items()})
        facts: dict[str, object] = {
            "kind": self.kind,
            "state_hash": self.state_hash,
            "num_examples": self.num_examples,
            "sign": self.sign,
            "scale": self.scale,
            "reduction": self.reduction,
            "clients": self.clients,
            # safetensors sorts names; sums over tensors round differently in another order.
            "names": list(self.tensors),
        }
        return tensors, facts

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> Update:
        """The inverse of :meth:`pack`."""
        groups: dict[str, dict[str, Tensor]] = {"tensors": {}, "before": {}, "after": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            if group not in groups or not name:
                raise InvalidInput(f"{key!r} is not a tensor of an update file.")
            groups[group][name] = tensor
        try:
            known = _Facts.from_json(dict(facts))
        except (InvalidParameter, TypeError) as problem:
            raise InvalidInput(f"The update's description is malformed: {problem}") from None
        named = groups["tensors"]
        if known.names and set(known.names) != set(named):
            odd = sorted(set(known.names) ^ set(named))[0]
            raise InvalidInput(f"The update's description and its tensors differ: {odd!r}.")
        described = {name: fact for name, fact in vars(known).items() if name != "names"}
        return cls(
            tensors={name: named[name] for name in known.names or named},
            buffers_before=groups["before"],
            buffers_after=groups["after"],
            **described,
        )

    def save(self, path: Path | str) -> None:
        """Write to one safetensors file."""
        tensors, facts = self.pack()
        save_file(tensors, path, metadata={"leakatlas.update": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path | str) -> Update:
        """Read what :meth:`save` wrote, and check it.

        Raises:
            InvalidInput: If the file is missing, truncated, foreign, or holds non-finite values.
        """
        tensors, texts = tensorfiles.read_safetensors(path, what="update")
        who = f"The update's description in {shown(str(path))}"
        facts = reading.parse_json(texts.get("leakatlas.update", "null"), who=who)
        if not isinstance(facts, dict):
            raise InvalidInput(
                f"{shown(str(path))} is a safetensors file but not an update: its metadata lacks "
                "'leakatlas.update'."
            )
        return cls.unpack(tensors, facts).check()


def average(updates: Mapping[int, Update], weights: Mapping[int, float] | None = None) -> Update:
    """The weighted mean of clients' updates, weighted by their examples unless told otherwise.

    For sum-reduced gradients the weights are 1, so that the result is the mean of sums.

    Raises:
        InvalidInput: If there are none, or they differ in kind, sign, scale or names.
    """
    if not updates:
        raise InvalidInput("There are no updates to average.")
    first = next(iter(updates.values()))
    for client, update in updates.items():
        same = (update.kind, update.sign, update.scale, update.reduction) == (
            first.kind, first.sign, first.scale, first.reduction,
        )  # fmt: skip
        if not same or update.tensors.keys() != first.tensors.keys():
            raise InvalidInput(
                f"Client {client}'s update ({update.kind}, sign {update.sign}, scale "
                f"{update.scale}, {len(update.tensors)} tensors) cannot be averaged with "
                f"({first.kind}, sign {first.sign}, scale {first.scale}, "
                f"{len(first.tensors)} tensors)."
            )
    if weights is None:
        weights = {
            c: float(u.num_examples if u.reduction == "mean" else 1) for c, u in updates.items()
        }
    total_weight = sum(weights.values())

    def mean(content: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        start = next(iter(content.values()))
        sums = {n: torch.zeros_like(t) for n, t in start.items() if t.is_floating_point()}
        for client, tensors in content.items():
            for name, total in sums.items():
                total.add_(tensors[name], alpha=weights[client] / total_weight)
        # Integer buffers (step counters) are not averaged; the first client's stands.
        return {name: sums.get(name, tensor) for name, tensor in start.items()}

    return replace(
        first,
        tensors=mean({c: u.tensors for c, u in updates.items()}),
        buffers_after=mean({c: u.buffers_after for c, u in updates.items()}),
        num_examples=sum(u.num_examples for u in updates.values()),
        clients=len(updates),
    )
