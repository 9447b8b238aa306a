"""What strangers write is shown as it stands: no colour, no link and no error comes of it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from leakatlas.bench.record import Record
from leakatlas.catalogue import loader, results
from leakatlas.cli import app, bench, catalogue, codes, lint, plain
from leakatlas.cli.progress import Bars, Cells, not_tried, verdict_table
from leakatlas.errors import InvalidInput
from leakatlas.lint import Verdict
from leakatlas.lint.findings import Finding, Score
from leakatlas.report import Report, Run

NASTY = ("[red]a[/]", "[/]", "[link=file:///x]b", "[/x] \\", "[bold]\\[1]", "[@click=x]", ":boom:")
"""Tags that open, that close what nobody opened, links, and a backslash before our own tag."""

every = pytest.mark.parametrize("text", NASTY)


def _console() -> Console:
    return plain.console(
        file=io.StringIO(), width=2_000, force_terminal=True, color_system="truecolor"
    )


def _shown(console: Console) -> str:
    """What stands there, the terminal's own sequences left out."""
    file = cast(io.StringIO, console.file)
    assert "\x1b]8" not in file.getvalue(), "a link"
    return Text.from_ansi(file.getvalue()).plain


def _run(text: str, **changes: Any) -> Run:
    run = Run(
        setting=text, attack=text, letter=text, vantage="server", target=0, defenses=(text,),
        status="error", reason=text, verdict="not tested", wants=text,
    )  # fmt: skip
    return replace(run, **changes)


@every
def test_progress_of_an_audit(text: str) -> None:
    console = _console()
    bars = Bars(console)
    bars.begin(2)
    bars.run(text, 0.5, text)
    console.print(bars.progress)
    assert _shown(console).count(text) == 2
    bars.done(_run(text))
    assert _shown(console).count(text) == 2 + 4


@every
def test_progress_and_table_of_studies(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell:
        name, label, seed, batch = "c", text, 0, 0

    console = _console()
    cells = Cells(console, text, total=1)
    cells.begun(cast(Any, Cell))
    console.print(cells.progress)
    assert _shown(console).count(text) == 2
    record = Record(
        cell="c", code="", study=text, label=text, seed=0, batch=0, status="error", reason=text,
        recipe={},
    )  # fmt: skip
    cells.done(cast(Any, Cell), record)
    assert _shown(console).count(text) == 4

    facts = {
        "study": text, "title": text, "cases": 1, "cells": 1, "left": 1, "stale": 0,
        "status": {"error": 1}, "reasons": [text],
    }  # fmt: skip
    table = _console()
    monkeypatch.setattr(plain, "console", lambda: table)
    monkeypatch.setattr(bench, "_facts", lambda study, now: facts)
    monkeypatch.setattr("leakatlas.bench.runner.standing", lambda study, options: None)
    bench._table([cast(Any, Cell)], cast(Any, None), only_stale=False, as_json=False)
    assert _shown(table).count(text) == 2


@every
def test_the_end_of_an_audit(text: str) -> None:
    console = _console()
    standing = _run(text, verdict="recognisable", status="complete")

    class Told:
        runs = (standing,)

        def standings(self) -> list[Any]:
            class Standing:
                letter = text
                deployed = bound = "recognisable"
                deployed_run = bound_run = standing

            return [Standing]

    console.print(verdict_table(cast(Report, Told())))
    console.print(not_tried(cast(Report, Told())))
    assert _shown(console).count(text) == 3


@every
def test_a_verdict_of_lint(text: str) -> None:
    score = Score("D1/detour", text, 0.9, text)
    verdict = Verdict(
        findings=(Finding(score, 0.5),), scores={}, skipped={"D9": text}, notes=(text,)
    )
    console = _console()
    lint._show(verdict, text, console)
    assert _shown(console).count(text) >= 6  # name, line of evidence, its place, table, note
    quiet = _console()
    lint._show(replace(verdict, findings=()), text, quiet)
    assert _shown(quiet).count(text) == 3


@every
def test_errors_of_the_tree_and_defects(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = _console()
    monkeypatch.setattr(plain, "console", lambda **settings: console)
    monkeypatch.setattr(codes, "write_trace", lambda defect: text)
    codes._explained(InvalidInput(text))
    codes._explained(RuntimeError(text))
    assert _shown(console).count(text) == 3


@every
def test_rows_of_tables_and_rows_of_the_catalogue(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, table = _console(), Table("a", "b")
    plain.row(table, text, text)
    console.print(table)
    assert _shown(console).count(text) == 2

    told = _console()
    monkeypatch.setattr(plain, "console", lambda **settings: told)
    row = loader.attack("dlg")
    claim = row.reported[0].model_copy(update={"measure": text, "setting": text, "source": text})
    strange = row.model_copy(update={"summary": text, "notes": (text,), "reported": (claim,)})
    monkeypatch.setattr(catalogue, "_row", lambda key: ("attack", strange))
    monkeypatch.setattr(results, "load", lambda folder: [])
    catalogue.show("dlg")
    assert _shown(told).count(text) == 5


def _typed(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "2000", "TERM": "dumb"})
    return done.exit_code, done.output + (done.stderr if done.stderr_bytes else "")


@pytest.mark.parametrize("text", ["[red]a[/]", "[/]", "[link=x]b"])
@pytest.mark.parametrize(
    "command",
    [
        lambda text: ("lint", text),
        lambda text: ("show", text),
        lambda text: ("doctor", text),
        lambda text: ("bench", text),
        lambda text: ("validate", text),
        lambda text: (text,),
    ],
)
def test_words_on_the_command_line(
    command: Callable[[str], tuple[str, ...]],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = _typed(*command(text))
    assert code in (1, 2) and text in output, output


def test_the_doctor_shows_names_of_files_layers_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text of a user's that the doctor repeats, in one set-up."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[red]net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_module('[/x]', nn.Linear(192, 2))\n"
        "    def forward(self, x):\n"
        "        return getattr(self, '[/x]')(x.flatten(1))\n"
    )
    images = tmp_path / "[bold]pictures"
    for name in ("[/]", "[red]b"):
        (images / name.replace("/", "∕")).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8), (index * 90, 9, 9)).save(
                images / name.replace("/", "∕") / f"[/i]{index}.png".replace("/", "∕")
            )
    config = {
        "model": {"python": "[red]net.py:Net"},
        "data": {"victims": "folder:[bold]pictures@8", "limit": 2},
        "threat": "B",
        "attacks": ["dlg"],
    }
    (tmp_path / "[link=x].yaml").write_text(json.dumps(config))
    code, output = _typed("doctor", "[link=x].yaml")
    assert code == 0, output
    assert "[red]net.py:Net, fedsgd" in output
    assert "[red]b" in output  # the mapping of classes is a note


def test_nothing_in_the_terminal_is_written_around_the_escape() -> None:
    """Rich's own escape drops backslashes, and its consoles make pictures of words."""
    for file in Path(catalogue.__file__).parent.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name != "plain.py":
            assert "rich.markup" not in text and not re.search(r"\bConsole\(", text), file.name
            assert 'TextColumn("{' not in text, file.name
