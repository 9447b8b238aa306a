"""The set-up in which an attack runs in a blink; every attack's test file gives one, ``CASE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A set-up in which an attack runs in a blink.

    Args:
        parameters: Of the attack; few steps.
        scene: For :func:`tests.conftest.build_stage`.
        boxed: Whether candidates are promised to lie in the pixel box.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    scene: Mapping[str, Any] = field(default_factory=dict)
    boxed: bool = False


LENET: Mapping[str, Any] = {"model": "lenet", "settings": {"width": 4}}
"""A scene that most attacks can handle."""
