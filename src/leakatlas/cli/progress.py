"""Progress and results of an audit, for people at a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from leakatlas.cli import plain
from leakatlas.cli.plain import escape
from leakatlas.report import RECOGNISABLE_PSNR, Realism, Report, Run, Verdict, beside
from leakatlas.report.realism import COINCIDE

if TYPE_CHECKING:
    from leakatlas.bench.cells import Cell
    from leakatlas.bench.record import Record

STYLES = {
    "exact leak": "bold red",
    "recognisable": "yellow",
    "label leak only": "cyan",
    "not demonstrated": "dim",
    "not tested": "dim",
    "not scored": "dim",
}
REASON_WIDTH = 100
"""Characters of a reason in the terminal; all of it is in the report."""


class Bars:
    """A bar for the audit, one for the attack that is running, and a line for each result."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            plain.Words(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._all = self.progress.add_task("audit", total=None)
        self._one = self.progress.add_task("", total=100)

    def begin(self, total: int) -> None:
        """Show how many runs are planned."""
        self.progress.update(self._all, total=total)

    def run(self, name: str, fraction: float, note: str = "") -> None:
        """Move the bar of the present attack."""
        said = f"{escape(name)} [dim]{escape(note)}[/]" if note else escape(name)
        self.progress.update(self._one, description=said, completed=round(100 * fraction))

    def done(self, run: Run) -> None:
        """Print one line, and a second one where the run did not simply end."""
        best = ""
        if run.scores is not None:
            best = f"{beside(run.scores.psnr.max, RECOGNISABLE_PSNR):>5} dB"
        self.console.print(
            f"  [{STYLES[run.verdict]}]{run.verdict:<17}[/] "
            f"{escape(f'{run.attack:<20} {run.letter:<2}')}"
            f"{best:<9} {run.seconds:6.1f} s  [dim]{escape(run.setting)}[/]",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis",
        )
        if run.status != "complete":
            self.console.print(f"    {why(run)}", highlight=False)
        self.progress.advance(self._all)


def why(run: Run) -> str:
    """The status of a run with its reason in a few words, as markup."""
    style = "bold red" if run.status == "error" else "yellow"
    reason = textwrap.shorten(run.reason, REASON_WIDTH, placeholder=" ...")
    return f"[{style}]{run.status}[/]: {escape(reason)}" if reason else f"[{style}]{run.status}[/]"


def not_tried(report: Report) -> str:
    """How many attacks fit no set-up; those that the user could help are reasons of their own."""
    counts = {
        status: sum(run.status == status and not run.wants for run in report.runs)
        for status in ("refused", "not applicable")
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"Attacks that did not fit a set-up: {said}; the report says why." if said else ""


def disowned(report: Report) -> list[str]:
    """What controls on another batch say against runs that came to their end, in plain text."""
    said = [
        f"{run.attack} under {run.letter} on {run.setting}: {run.reason}."
        for run in report.runs
        if run.status == "complete" and run.reason
    ]
    return list(dict.fromkeys(said))


class Cells:
    """A bar for a study with the time left, and a line for each cell that did not end well.

    Args:
        console: Where.
        name: Of the study.
        total: Cells that will be run.
        quiet: Show nothing.
    """

    def __init__(self, console: Console, name: str, *, total: int, quiet: bool = False) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            plain.Words(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet,
        )
        self._all = self.progress.add_task(escape(name), total=total)
        self._running: dict[str, TaskID] = {}
        self._quiet = quiet

    def __enter__(self) -> Cells:
        """Start to show."""
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop showing."""
        self.progress.stop()

    def begun(self, cell: Cell) -> None:
        """A further bar."""
        said = f"[dim]{escape(cell.label)}, seed {cell.seed}, batch {cell.batch}[/]"
        self._running[cell.name] = self.progress.add_task(said, total=1.0)

    def moved(self, cell: Cell, fraction: float, note: str) -> None:
        """Move its bar."""
        self.progress.update(self._running[cell.name], completed=fraction)

    def done(self, cell: Cell, record: Record) -> None:
        """Remove its bar; say how it ended if not well."""
        self.progress.remove_task(self._running.pop(cell.name))
        self.progress.advance(self._all)
        if not self._quiet and record.status in ("error", "refused"):
            self.console.print(
                f"  [yellow]{record.status}[/] {escape(cell.label)}, seed {cell.seed}, batch "
                f"{cell.batch}: [dim]{escape(record.reason)}[/]",
                highlight=False,
            )


def verdict_table(report: Report) -> Table:
    """Both verdicts by threat model."""
    table = Table(
        title="Who can see what, by which attack, with the best image", title_justify="left"
    )
    for column in ("", "as deployed", "diagnostic upper bound"):
        table.add_column(column)
    for found in report.standings():
        deployed = _cell(found.deployed, found.deployed_run)
        table.add_row(escape(found.letter), deployed, _cell(found.bound, found.bound_run))
    return table


def _cell(verdict: Verdict, run: Run | None) -> str:
    """A verdict, and below it what it rests on."""
    text = f"[{STYLES[verdict]}]{verdict}[/]"
    if run is None:
        return text
    best = ""
    if run.scores is not None:
        best = f", {beside(run.scores.psnr.max, RECOGNISABLE_PSNR)} dB"
    return f"{text}\n[dim]{escape(run.attack)}{best}[/]"


def realism_lines(found: Realism) -> list[str]:
    """The realism record of a set-up, and what separates its two verdicts, in plain text."""
    lines = [f"Realism of {found.setting}: {found.in_words()}."]
    lines += [f"  - {caution}" for caution in found.cautions]
    if found.separates:
        lines.append(f"  Upper bound beyond as deployed: {'; '.join(found.separates)}.")
        if found.reason:
            lines.append(f"  The other verdict was not run: {found.reason}.")
    else:
        lines.append(f"  As deployed and upper bound: {COINCIDE}.")
    return lines
