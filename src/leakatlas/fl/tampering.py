"""What a malicious server sends in a round: values and edits, never a live model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from leakatlas import reading, tensorfiles
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName, shown
from leakatlas.fl import state
from leakatlas.fl.edits import EDITS, Edit, Imprinted
from leakatlas.params import NonNegativeInt

METADATA = "leakatlas.tampering"


@dataclass(frozen=True, kw_only=True)
class TamperedModel:
    """One model as it is sent: other values for the agreed parameters, and blocks before them.

    Args:
        weights: Values by the names of the agreed architecture, buffers included; what is not
            named keeps the value of the global model.
        edits: Blocks from the closed list, in the order in which an input passes them.

    Raises:
        InvalidInput: If something is not plain data of the closed list.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()

    def __post_init__(self) -> None:
        for edit in self.edits:
            # A subclass would bring code of its own.
            if type(edit) is not EDITS.get(type(edit).__name__):
                raise InvalidInput(
                    f"{type(edit).__name__} is no edit that a client builds; the closed list is: "
                    f"{', '.join(EDITS)}."
                )
            _check_plain(_tensors_of(edit))
        _check_plain(self.weights)

    @classmethod
    def of(cls, model: nn.Module, *edits: Edit) -> TamperedModel:
        """The values of ``model``, a changed copy of the agreed one, behind ``edits``."""
        return cls(weights=state.model_state(model), edits=edits)

    def build(
        self, agreed: nn.Module, *, pixels: int, private: frozenset[str] = frozenset()
    ) -> nn.Module:
        """What the client makes of it; runs on the client's side.

        Args:
            agreed: The architecture that client and server agreed on, with the global values and
                the client's private ones; not changed.
            pixels: Entries of one of the client's inputs.
            private: Names that no server sets.

        Raises:
            InvalidInput: If a name, shape or dtype is none of the agreed model's.
        """
        held = state.model_state(agreed)
        for name, tensor in self.weights.items():
            if name not in held or (held[name].shape, held[name].dtype) != (
                tensor.shape, tensor.dtype,
            ):  # fmt: skip
                own = held.get(name)
                expected = "nothing" if own is None else f"{own.dtype} {tuple(own.shape)}"
                raise InvalidInput(
                    f"The server sent {name!r} as {tensor.dtype} {tuple(tensor.shape)}; the agreed "
                    f"architecture has {expected} there."
                )
            if name not in private:
                held[name] = tensor
        model = state.load_into(agreed, held)
        like = next(model.parameters(), torch.empty(0))
        for edit in reversed(self.edits):
            dtypes = {tensor.dtype for tensor in _tensors_of(edit).values()}
            if edit.pixels != pixels or dtypes != {like.dtype}:
                raise InvalidInput(
                    f"{type(edit).__name__} is made for {edit.pixels} entries of "
                    f"{', '.join(map(str, dtypes))}; the client's inputs have {pixels} of "
                    f"{like.dtype}."
                )
            model = Imprinted(edit.layers().to(like.device), model)
        return model


def agreed_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The prefix of the agreed architecture's names in what a client built, and that part of it."""
    prefix = ""
    while isinstance(model, Imprinted):
        prefix, model = f"{prefix}model.", model.model
    return prefix, model


@dataclass(frozen=True, kw_only=True)
class Tampering:
    """What a malicious server does to one round; plain data, so that it can come from a file.

    Args:
        sent: The model for every client, or one for each; who has none gets the global model.
        key: What the read-out will need; given back as ``view.key``.
        cohort: Who is asked to take part; everyone if None. Needs SELECTION.
        sybils: How many devices of its own the server adds. Needs SELECTION.

    Raises:
        InvalidInput: If a model or tensor is not plain data.
    """

    sent: TamperedModel | Mapping[int, TamperedModel]
    key: Mapping[str, Tensor]
    cohort: tuple[int, ...] | None = None
    sybils: int = 0

    def __post_init__(self) -> None:
        sent = self.sent.values() if isinstance(self.sent, Mapping) else [self.sent]
        for model in sent:
            check_sendable(model)
        _check_plain(self.key)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain facts, for a file; what clients share is held once."""
        tensors: dict[str, Tensor] = {f"key/{name}": t for name, t in self.key.items()}
        places: dict[int, str] = {}

        def put(tensor: Tensor) -> str:
            place = places.setdefault(id(tensor), f"sent/{len(places)}")
            tensors[place] = tensor
            return place

        numbers: dict[int, int] = {}
        models: list[dict[str, Any]] = []

        def number(model: TamperedModel) -> int:
            if id(model) not in numbers:
                numbers[id(model)] = len(models)
                models.append(
                    {
                        "weights": {name: put(t) for name, t in model.weights.items()},
                        "edits": [_pack_edit(edit, put) for edit in model.edits],
                    }
                )
            return numbers[id(model)]

        sent: object = (
            {str(client): number(model) for client, model in self.sent.items()}
            if isinstance(self.sent, Mapping)
            else number(self.sent)
        )
        facts = {
            "models": models,
            "sent": sent,
            "cohort": None if self.cohort is None else list(self.cohort),
            "sybils": self.sybils,
        }
        return {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, facts

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> Tampering:
        """The inverse of :meth:`pack`; nothing but data comes out, whatever the file holds.

        Raises:
            InvalidInput: If the description is malformed, or refers to a tensor that is not there.
        """
        try:
            known = _Facts.model_validate(dict(facts))
            models = [
                TamperedModel(
                    weights={name: tensors[place] for name, place in model.weights.items()},
                    edits=tuple(_unpack_edit(edit, tensors) for edit in model.edits),
                )
                for model in known.models
            ]
            sent = (
                models[known.sent]
                if isinstance(known.sent, int)
                else {client: models[number] for client, number in known.sent.items()}
            )
        except ValidationError as problem:
            first = problem.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidInput(
                f"The tampering's description is malformed at {place!r}: {first['msg']}."
            ) from None
        except (InvalidParameter, UnknownName) as problem:
            raise InvalidInput(f"The tampering's description is malformed: {problem}") from None
        except (KeyError, IndexError) as problem:
            raise InvalidInput(
                f"The tampering's description refers to {problem}, which is not there."
            ) from None
        except TypeError as problem:  # an edit without one of its fields
            raise InvalidInput(f"The tampering's description is incomplete: {problem}.") from None
        return cls(
            sent=sent,
            key={n.removeprefix("key/"): t for n, t in tensors.items() if n.startswith("key/")},
            cohort=known.cohort,
            sybils=known.sybils,
        )

    def copy(self) -> Tampering:
        """What a file would bring: plain data that shares nothing with its sender."""
        tensors, facts = self.pack()
        return self.unpack(tensors, json.loads(json.dumps(facts)))

    def save(self, path: Path | str) -> None:
        """Write to one safetensors file."""
        tensors, facts = self.pack()
        save_file(tensors, path, metadata={METADATA: json.dumps(facts)})

    @classmethod
    def load(cls, path: Path | str) -> Tampering:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidInput: If the file is missing, truncated or foreign.
        """
        tensors, texts = tensorfiles.read_safetensors(path, what="tampering")
        who = f"The tampering's description in {shown(str(path))}"
        facts = reading.parse_json(texts.get(METADATA, "null"), who=who)
        if not isinstance(facts, dict):
            raise InvalidInput(
                f"{str(path)!r} is a safetensors file but no tampering: its metadata lacks "
                f"{METADATA!r}."
            )
        return cls.unpack(tensors, facts)


def check_sendable(model: object) -> None:
    """Refuse everything but a :class:`TamperedModel` itself.

    Raises:
        InvalidInput: For a live module above all: its hooks would run on the client.
    """
    if type(model) is not TamperedModel:
        raise InvalidInput(
            f"A client trains on what it builds itself from a TamperedModel (values and edits), "
            f"got {type(model).__name__}; TamperedModel.of(module) takes a module's values."
        )


# -- plain data ------------------------------------------------------------------------------------


class _EditFacts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: str
    tensors: dict[str, str]
    facts: dict[str, Any]


class _ModelFacts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    weights: dict[str, str]
    edits: list[_EditFacts]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    models: list[_ModelFacts]
    sent: NonNegativeInt | dict[int, NonNegativeInt]
    cohort: tuple[int, ...] | None
    sybils: NonNegativeInt


def _tensors_of(edit: Edit) -> dict[str, Tensor]:
    values = {f.name: getattr(edit, f.name) for f in fields(edit)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _pack_edit(edit: Edit, put: Callable[[Tensor], str]) -> dict[str, Any]:
    tensors = _tensors_of(edit)
    return {
        "kind": type(edit).__name__,
        "tensors": {name: put(tensor) for name, tensor in tensors.items()},
        "facts": {f.name: getattr(edit, f.name) for f in fields(edit) if f.name not in tensors},
    }


def _unpack_edit(edit: _EditFacts, tensors: Mapping[str, Tensor]) -> Edit:
    if edit.kind not in EDITS:
        raise UnknownName("edit", edit.kind, EDITS)
    named = {name: tensors[place] for name, place in edit.tensors.items()}
    return EDITS[edit.kind].from_json({**edit.facts, **named})


PLAIN: tuple[type, ...] = (Tensor, nn.Parameter)
"""A subclass may run code in any operation."""


def _check_plain(tensors: Mapping[str, object]) -> None:
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN:
            raise InvalidInput(f"{name!r} is a {type(tensor).__name__}, expected a plain tensor.")
