"""A study's own Python file."""

from __future__ import annotations

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from leakatlas.errors import InvalidInput, LeakAtlasError

_LOADED: dict[Path, ModuleType] = {}


class StudyFault(InvalidInput):
    """A study's own code raised; the message says what, and at which line."""


def function(hook: Path, study: str, name: str, signature: str, purpose: str) -> Callable[..., Any]:
    """A function of the file, which runs here; who loads it has decided to trust it.

    Args:
        hook: The file.
        study: Name of the study.
        name: Of the function.
        signature: Its arguments and result, for people.
        purpose: What it is for, for people.

    Returns:
        The function; whatever it raises, errors of ours apart, is a :class:`StudyFault`.

    Raises:
        InvalidInput: If the file does not define it.
        StudyFault: If the file cannot be loaded.
    """
    if hook not in _LOADED:
        spec = importlib.util.spec_from_file_location(f"leakatlas_study_{study}", hook)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with _faults(hook):
            spec.loader.exec_module(module)
        _LOADED[hook] = module
    found = getattr(_LOADED[hook], name, None)
    if not callable(found):
        raise InvalidInput(f"{hook} must define {name}{signature} for {purpose}.")

    @functools.wraps(found)
    def called(*arguments: Any) -> Any:
        with _faults(hook):
            return found(*arguments)

    return called


@contextmanager
def _faults(hook: Path) -> Iterator[None]:
    try:
        yield
    except LeakAtlasError:
        raise
    # What somebody else wrote raises whatever it likes; it costs its cell and no other.
    except Exception as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == hook]
        where = f", line {own[-1].lineno}, in {own[-1].name}" if own else ""
        raise StudyFault(
            f"{hook.parent.name}/{hook.name}{where}: {type(problem).__name__}: {problem}"
        ) from problem
