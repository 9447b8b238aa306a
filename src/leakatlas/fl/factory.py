"""A user's own model code: the one place where code is run that is not LeakAtlas's.

It is reached only when a person names it as code (``model: {python: file.py:factory}``,
``leakatlas lint file.py:factory``, ``trust_code=True``), never because a file says so. Whatever
that code does wrong is told with its file and line.

A file is its owner's, and runs. Much of what is installed, though, runs programs or loads code
(``os:system``, ``torch.hub:load``): the standard library is never taken, by name or by file, and a
factory in a package has to say that it makes a model, as a class of modules or by its return type.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from leakatlas.errors import EndedAtOnce, InvalidInput, LeakAtlasError, UnknownName, shown


def make(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The module that a factory returns.

    Args:
        name: ``file.py:factory``, or ``package.module:factory`` for a class of modules or a
            function whose return type is one.
        kwargs: Arguments of the factory.

    Raises:
        InvalidInput: If the code cannot be found or run, does not say that it makes a model, or
            returns something else.
        UnknownName: If the file has no such factory.
    """
    factory = find(name, "model")
    if not name.rpartition(":")[0].endswith(".py") and not _makes_models(factory):
        raise InvalidInput(
            f"{shown(name)} was not run: of an installed package only classes of torch.nn.Module "
            "are, and functions whose return type says that they make one ('-> nn.Module'). Write "
            "a function into a file of yours and name that: 'file.py:factory'."
        )
    with _running(f"The model factory {shown(name)}", name.rpartition(":")[0]):
        model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"{shown(name)} returned {type(model).__name__}, expected a torch.nn.Module."
        )
    return model


def find(name: str, kind: str) -> Callable[..., object]:
    """The function that a person named as code.

    Args:
        name: ``file.py:function`` or ``package.module:function``.
        kind: What it makes or is, for messages: ``model``, ``loss``.

    Raises:
        InvalidInput: If the code cannot be found or run.
        UnknownName: If it has no such function.
    """
    what = "factory" if kind == "model" else "function"
    location, separator, attribute = name.rpartition(":")
    if not separator or not location or not attribute:
        raise InvalidInput(f"A {kind} in Python code is 'file.py:{what}', got {shown(name)}.")
    who = f"The {kind} {'file' if location.endswith('.py') else 'module'} {shown(location)}"
    if location.endswith(".py"):
        with _running(who, location):
            file = Path(location)
            if not file.is_file():
                raise InvalidInput(f"{who} does not exist (from {shown(name)}).")
            if _installed(file):
                raise InvalidInput(
                    f"{who} belongs to Python or to an installed package and was not run; name "
                    "what it makes as 'package.module:factory'."
                )
            spec = importlib.util.spec_from_file_location(f"leakatlas_user_{file.stem}", file)
            if spec is None or spec.loader is None:
                raise InvalidInput(f"{who} is not importable Python.")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            with _without_bytecode():
                spec.loader.exec_module(module)
    else:
        if location.partition(".")[0] in sys.stdlib_module_names:
            raise InvalidInput(
                f"{who} is Python's own and was not run: it holds no {kind}. A file of yours is "
                f"named 'file.py:{what}'."
            )
        try:
            with _running(who, location):
                module = importlib.import_module(location)
        except InvalidInput as problem:
            if isinstance(problem.__cause__, ModuleNotFoundError):
                raise InvalidInput(
                    f"{who} is not importable: {problem.__cause__}. A file is named with its "
                    "suffix, as in 'file.py:factory'."
                ) from None
            raise
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownName(f"{kind} {what} in {location}", attribute, names)
    return factory  # type: ignore[no-any-return]  # checked callable just above


def _installed(file: Path) -> bool:
    """Whether a file is part of Python or of a package, and nobody's own."""
    places = sysconfig.get_paths()
    here = file.resolve()
    return any(
        here.is_relative_to(Path(places[place]).resolve())
        for place in ("stdlib", "platstdlib", "purelib", "platlib")
    )


def _makes_models(factory: Callable[..., object]) -> bool:
    """Whether a callable says that it makes modules; nothing is called to find out."""
    made: object = factory
    if not isinstance(factory, type):
        # Whatever a stranger's annotation cannot be read for, it says nothing.
        with suppress(Exception):
            made = typing.get_type_hints(factory).get("return")
    return isinstance(made, type) and issubclass(made, nn.Module)


@contextmanager
def _without_bytecode() -> Iterator[None]:
    """Leave no ``__pycache__`` in a user's folder."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _running(who: str, location: str) -> Iterator[None]:
    try:
        yield
    except LeakAtlasError:
        raise
    # A stranger's code raises whatever it likes, and `sys.exit` in it must not pass for a result.
    except (Exception, SystemExit) as problem:
        raise InvalidInput(
            f"{who} failed{_place(problem, location)}: {_said(problem)}"
        ) from problem


def _said(problem: BaseException) -> str:
    if isinstance(problem, SystemExit):
        call = "os._exit" if isinstance(problem, EndedAtOnce) else "sys.exit"
        return f"it calls {call}({shown(problem.code)}); a model file only defines things."
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:400]}"


def _place(problem: BaseException, location: str) -> str:
    """File and line: of a mistake in the syntax, or of the last line of the user's that ran."""
    if isinstance(problem, SyntaxError) and problem.filename:
        return f" at {problem.filename}, line {problem.lineno}"
    frames = traceback.extract_tb(problem.__traceback__)
    stem = Path(location).name
    own = [frame for frame in frames if Path(frame.filename).name == stem]
    # What is called wrongly (bad arguments) fails in our frame, before any of the user's.
    foreign = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    last = (own or [f for f in foreign if "importlib" not in f.filename])[-1:]
    return f" at {last[0].filename}, line {last[0].lineno}" if last else ""
