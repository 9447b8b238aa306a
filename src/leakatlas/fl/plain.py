"""Defenses and protocols as plain JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leakatlas.catalogue import registry
from leakatlas.errors import InvalidInput, InvalidParameter, UnknownName, shown
from leakatlas.fl.hooks import Defense
from leakatlas.fl.protocol import PROTOCOLS, Protocol


def defense_json(defense: Defense) -> dict[str, Any]:
    """A defense as ``{"key": ..., parameters}``."""
    return {"key": defense.key, **defense.to_json()}


def defense_from_json(description: Mapping[str, Any]) -> Defense:
    """The defense that :func:`defense_json` described.

    Raises:
        UnknownName: If no defense has that key.
        InvalidInput: If the key is missing.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("key"), str):
        raise InvalidInput(f"A defense needs its 'key' as text; got {shown(description)}.")
    values = dict(description)
    cls = registry.load_defense(values.pop("key"))
    return cls.from_json(values)  # type: ignore[no-any-return]  # the registry is torch-free, hence untyped


def protocol_json(protocol: Protocol) -> dict[str, Any]:
    """A protocol as ``{"algorithm": ..., parameters}``."""
    return {"algorithm": type(protocol).__name__.lower(), **protocol.to_json()}


def protocol_from_json(description: Mapping[str, Any]) -> Protocol:
    """The protocol that :func:`protocol_json` described.

    Raises:
        UnknownName: If there is no such algorithm.
        InvalidParameter: If a parameter is unknown or outside its range.
    """
    if not isinstance(description, Mapping):
        raise InvalidInput(f"A protocol is described by names; got {shown(description)}.")
    values = dict(description)
    for key, value in values.items():
        if "algorithm" not in values and isinstance(value, str) and value.lower() in PROTOCOLS:
            raise InvalidParameter(
                f"The protocol has no key {shown(key)}; the learning algorithm stands under "
                f"'algorithm'. Write algorithm: {value.lower()}."
            )
    algorithm = values.pop("algorithm", "fedsgd")
    algorithm = algorithm.lower() if isinstance(algorithm, str) else algorithm
    if not isinstance(algorithm, str) or algorithm not in PROTOCOLS:
        raise UnknownName("learning algorithm", algorithm, PROTOCOLS)
    return PROTOCOLS[algorithm].from_json(values)
