"""Doors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from typer.testing import CliRunner

from leakatlas.cli import app

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Door:
    """One way in.

    Args:
        files: What may be found there.
        open: What a user calls on it.
        share: Of the inputs of a campaign, relative to the others.
        examples: In the gate.
    """

    files: st.SearchStrategy[Files]
    open: Callable[[Path], object]
    share: float = 1.0
    examples: int = 200


DOORS: dict[str, Door] = {}


def door(
    files: st.SearchStrategy[Files], *, share: float = 1.0, examples: int = 200
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Register what follows under its name."""

    def register(function: Callable[[Path], object]) -> Callable[[Path], object]:
        DOORS[function.__name__] = Door(files, function, share, examples)
        return function

    return register


def one(name: str, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[Files]:
    """One file."""
    return content.map(lambda held: {name: held})


def command(*arguments: str) -> int:
    """A command, in this process.

    Raises:
        AssertionError: If it ended as a defect of ours.
    """
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code in (0, 1, 2, 3), (done.exit_code, done.output[-300:], done.exception)
    return done.exit_code
