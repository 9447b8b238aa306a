"""The message of a client: named tensors whose meaning is written on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.errors import InvalidInput, InvalidParameter, shown
from leakatlas.fl.naming import Arrays, by_name
from leakatlas.fl.state import state_hash
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

    # -- from what FL systems hand over ---------------------------------------------------------

    @classmethod
    def from_arrays(
        cls, before: Arrays, after: Arrays, model: nn.Module, *, num_examples: int, clients: int = 1
    ) -> Update:
        """The delta between two states, as a server holds them around a round.

        Args:
            before: What the client received: arrays by name, or a list in the order of
                ``model.state_dict()`` or of ``model.parameters()``.
            after: What it sent back, in the same form.
            model: Whose names these are; its values are not read.
            num_examples: Examples behind it, as the client reported them.
            clients: How many clients were averaged into it.

        Raises:
            InvalidInput: If the arrays do not fit the model or each other.
        """
        start = by_name(before, model, "state before")
        end = by_name(after, model, "state after")
        missing = sorted(set(end.parameters) - set(start.parameters))
        if missing:
            raise InvalidInput(
                f"The state before lacks {missing[0]!r}, which the state after holds; a delta "
                "needs both."
            )
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        moved = {
            name: tensor - start.parameters[name].to(tensor)
            for name, tensor in end.parameters.items()
            if name in trained
        }
        held = {**start.parameters, **start.buffers}
        return cls(
            tensors=moved,
            kind="delta",
            state_hash=state_hash(held),
            num_examples=num_examples,
            buffers_before=start.buffers,
            buffers_after=end.buffers,
            clients=clients,
        ).check()

    @classmethod
    def from_state_dicts(
        cls,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        model: nn.Module,
        *,
        num_examples: int,
        clients: int = 1,
    ) -> Update:
        """:meth:`from_arrays` for two mappings by name."""
        return cls.from_arrays(before, after, model, num_examples=num_examples, clients=clients)

    @classmethod
    def from_gradients(
        cls,
        gradients: Arrays,
        model: nn.Module,
        *,
        num_examples: int,
        reduction: Literal["mean", "sum"] = "mean",
        sign: Literal[1, -1] = 1,
        scale: float = 1.0,
        clients: int = 1,
    ) -> Update:
        """The gradient of one step, as ``[p.grad for p in model.parameters()]`` gives it.

        Args:
            gradients: By name, or in the order of ``model.parameters()``; None where a parameter
                takes no part.
            model: Whose names these are; its values are not read.
            num_examples: Examples behind it.
            reduction: Whether the loss was their mean or sum.
            sign: -1 if the descent direction was sent.
            scale: A positive factor that was applied.
            clients: How many clients were averaged into it.

        Raises:
            InvalidInput: If the arrays do not fit the model.
        """
        named = by_name(gradients, model, "gradient")
        if named.buffers:
            raise InvalidInput(
                f"The gradient has an entry for {next(iter(named.buffers))!r}, a buffer; buffers "
                "have none. Two states are Update.from_state_dicts(before, after, model, ...)."
            )
        return cls(
            tensors=named.parameters,
            kind="gradient",
            state_hash="",
            num_examples=num_examples,
            sign=sign,
            scale=scale,
            reduction=reduction,
            clients=clients,
        ).check()

    def as_delta(self, received: Mapping[str, Tensor]) -> Update:
        """An update of kind ``weights`` as the delta that it is; others as they are.

        Args:
            received: The state that the client received, by name.

        Raises:
            InvalidInput: If that state lacks one of the tensors.
        """
        if self.kind != "weights":
            return self
        lacking = next((name for name in self.tensors if name not in received), None)
        if lacking is not None:
            raise InvalidInput(
                f"The update holds weights, and the received state lacks {lacking!r}: without the "
                "state before there is no change to attack."
            )
        quantity = self.quantity()
        moved = {n: t - received[n].to(t) for n, t in quantity.items()}
        return replace(self, tensors=moved, kind="delta", sign=1, scale=1.0)

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
