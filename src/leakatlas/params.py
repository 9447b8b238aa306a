"""Constrained parameter types, and the base of everything that is configured.

An attack, a defense or a protocol is a frozen dataclass whose constraints stand in its field
types (``steps: PositiveInt = 4_800``). :class:`Configured` checks them when the object is made
and turns the object into plain JSON and back, so that a recipe can name it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from leakatlas.errors import InvalidParameter, LeakAtlasError, shown

LARGEST = 1e30
"""No setting needs a larger number, and single precision holds none beyond 3e38."""

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
PositiveOrInf = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Real = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]


_ADAPTERS: dict[type[Any], dict[str, TypeAdapter[Any]]] = {}


def _adapters(cls: type[Any]) -> dict[str, TypeAdapter[Any]]:
    if cls not in _ADAPTERS:
        hints = get_type_hints(cls, include_extras=True)
        # Infinities become the strings that JSON lacks; a tensor is checked by its type alone.
        config = ConfigDict(ser_json_inf_nan="strings", arbitrary_types_allowed=True)
        _ADAPTERS[cls] = {
            f.name: TypeAdapter(hints[f.name], config=config) for f in dataclasses.fields(cls)
        }
    return _ADAPTERS[cls]


def checked(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for some fields of a dataclass, each held against the type of its field.

    Raises:
        ValueError: If a value is of another type.
        KeyError: If there is no such field.
    """
    known = _adapters(cls)
    return {name: known[name].validate_python(value) for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configured:
    """A frozen set of checked parameters that round-trips through JSON."""

    def __post_init__(self) -> None:
        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            try:
                checked = adapter.validate_python(value)
            except ValidationError as problem:
                own = problem.errors()[0].get("ctx", {}).get("error")
                if isinstance(own, LeakAtlasError):  # already says who, what and the way out
                    raise own from None
                reason = problem.errors()[0]["msg"]
                raise InvalidParameter(
                    f"{type(self).__name__}({name}={shown(value)}): "
                    f"{reason[:1].lower()}{reason[1:]}."
                ) from None
            object.__setattr__(self, name, checked)

    def to_json(self) -> dict[str, Any]:
        """The parameters as plain JSON values (infinities as the strings JSON lacks)."""
        return {
            name: json.loads(adapter.dump_json(getattr(self, name)))
            for name, adapter in _adapters(type(self)).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The object whose :meth:`to_json` is ``values``.

        Raises:
            InvalidParameter: If a name is unknown or a value is outside its range.
        """
        if not isinstance(values, Mapping):
            raise InvalidParameter(f"{cls.__name__} takes names with values; got {shown(values)}.")
        known = _adapters(cls)
        unknown = [name for name in values if name not in known]
        if unknown:
            raise InvalidParameter(
                f"{cls.__name__} has no parameter {shown(unknown[0])}; it has: {', '.join(known)}."
            )
        return cls(**values)
