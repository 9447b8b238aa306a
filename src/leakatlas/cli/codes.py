"""What a command's exit code means, and what happens to an error that nobody expected."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

import leakatlas
from leakatlas.cli import plain
from leakatlas.cli.plain import escape
from leakatlas.errors import EndedAtOnce, LeakAtlasError, Undecided

FINE = 0
GATE_FAILED = 1
"""A condition holds, a model raised the alarm, an update is not what was described."""
BAD_INPUT = 2
UNDECIDED = 3
"""Too little ran for an answer."""
DEFECT = 4
"""Of LeakAtlas itself."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a size limit that leaves no room."""


class Guarded(TyperGroup):
    """Gives everything that ends a command its exit code; nothing ends as "fine" by accident."""

    def invoke(self, ctx: Any) -> Any:  # Typer's context is of a private type
        """Run the command."""
        try:
            with _no_silent_end():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, _usage_error()):  # the command's own ends
            raise
        except KeyboardInterrupt:
            _say("Stopped. Finished runs are kept; the same command continues.")
            raise typer.Exit(UNDECIDED) from None
        except SystemExit as end:  # no command of ours ends so: code under audit does
            if isinstance(end.__context__, BrokenPipeError):  # nobody reads on, as with `| head`
                raise typer.Exit(UNDECIDED) from None
            call = "os._exit" if isinstance(end, EndedAtOnce) else "sys.exit"
            _say(
                f"[bold yellow]Undecided:[/] the code under audit ended the process with "
                f"{call}({escape(repr(end.code))}) before there was an answer."
            )
            raise typer.Exit(UNDECIDED) from None
        except Exception as problem:
            raise typer.Exit(_explained(problem)) from None


@contextmanager
def _no_silent_end() -> Iterator[None]:
    """``os._exit`` of the code under audit, which passes every ``except`` by, is an exception here.

    What goes round Python (a C library's ``exit``, ``os.exec``) is beyond us.
    """
    really, own = os._exit, os.getpid()

    def end(status: int) -> NoReturn:
        if os.getpid() != own:  # a forked child, as multiprocessing makes them, ends as ever
            really(status)
        raise EndedAtOnce(status)

    os._exit = end
    try:
        yield
    finally:
        os._exit = really


def _usage_error() -> type[Exception]:
    """What a command line that cannot be used raises: Typer's own, or Click's under old Typers."""
    if hasattr(typer, "TyperException"):
        return typer.TyperException
    from click import ClickException

    return ClickException


def _explained(problem: Exception) -> int:
    """Say what went wrong and what to do; the exit code."""
    words = escape(str(problem))
    match problem:
        case Undecided():
            _say(f"[bold yellow]Undecided:[/] {words}")
            return UNDECIDED
        case LeakAtlasError():
            _say(f"[bold red]{type(problem).__name__}:[/] {words}")
            return BAD_INPUT
        case BrokenPipeError():  # whoever read our output has left; there is nobody to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return UNDECIDED
        case OSError() if problem.errno in FULL:
            _say(
                f"[bold red]No room to write:[/] {words}. Free some space, or choose another "
                "folder; what was kept before is not lost."
            )
            return BAD_INPUT
    _say(
        f"[bold red]A defect of LeakAtlas:[/] {type(problem).__name__}: {words}\n"
        f"The trace is in {escape(str(write_trace(problem)))}. Please attach it to a report; read "
        "it first, it names files of yours."
    )
    return DEFECT


def _say(markup: str) -> None:
    plain.console(stderr=True, soft_wrap=True, highlight=False).print(markup)


def write_trace(defect: BaseException) -> Path:
    """Write what a report of a defect needs: versions, command, trace."""
    now = datetime.now(UTC)
    text = "\n".join(
        (
            f"LeakAtlas {leakatlas.__version__}, Python {platform.python_version()}, "
            f"{platform.platform()}",
            f"torch {sys.modules['torch'].__version__ if 'torch' in sys.modules else 'not loaded'}",
            f"{now.isoformat(timespec='seconds')}: {shlex.join(['leakatlas', *sys.argv[1:]])}",
            "",
            "".join(traceback.format_exception(defect)),
        )
    )
    name = f"leakatlas-defect-{now:%Y%m%dT%H%M%S}.txt"
    for folder in (Path.cwd(), Path(tempfile.gettempdir())):
        try:
            (folder / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return folder / name
    return Path("(it could be written nowhere)")
