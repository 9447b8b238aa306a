"""Strangers' words in a terminal: shown as they are, never read as markup or as emoji."""

from __future__ import annotations

import re
from typing import Any

from rich import markup
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

_LONE = re.compile(r"\\(?=\[(?![a-z#/@][^\[]*?\]))")
"""A backslash before a bracket that opens no tag; Rich would drop it."""


def escape(text: str) -> str:
    """``text`` so that Rich's markup shows it as it is."""
    return markup.escape(_LONE.sub(r"\\\\", text))


def console(**settings: Any) -> Console:
    """A console that makes no pictures of ``:words:``."""
    return Console(emoji=False, **settings)


def row(table: Table, *cells: str) -> None:
    """Add a row of plain text; only what is written ``table.add_row`` may hold markup."""
    table.add_row(*map(escape, cells))


class Words(ProgressColumn):
    """The description of a bar, which may hold markup of ours."""

    def render(self, task: Task) -> Text:
        """Without pictures of ``:words:``."""
        return Text.from_markup(task.description, emoji=False)
