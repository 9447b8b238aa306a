"""A study's own Python file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from leakatlas.errors import InvalidInput

_LOADED: dict[Path, ModuleType] = {}


def function(hook: Path, study: str, name: str, signature: str, purpose: str) -> Callable[..., Any]:
    """A function of the file, which runs here; who loads it has decided to trust it.

    Args:
        hook: The file.
        study: Name of the study.
        name: Of the function.
        signature: Its arguments and result, for people.
        purpose: What it is for, for people.

    Raises:
        InvalidInput: If the file does not define it.
    """
    if hook not in _LOADED:
        spec = importlib.util.spec_from_file_location(f"leakatlas_study_{study}", hook)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _LOADED[hook] = module
    found = getattr(_LOADED[hook], name, None)
    if not callable(found):
        raise InvalidInput(f"{hook} must define {name}{signature} for {purpose}.")
    called: Callable[..., Any] = found
    return called
