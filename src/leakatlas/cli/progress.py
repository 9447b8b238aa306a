"""Progress and results of an audit, for people at a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from leakatlas.audit import Report, Run

STYLES = {
    "exact leak": "bold red",
    "recognisable": "yellow",
    "label leak only": "cyan",
    "not demonstrated": "dim",
}


class Bars:
    """A bar for the audit, one for the attack that is running, and a line for each result."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
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
        said = f"{name} [dim]{note}[/]" if note else name
        self.progress.update(self._one, description=said, completed=round(100 * fraction))

    def done(self, run: Run) -> None:
        """Print one line."""
        psnr = "" if run.scores is None else f"{run.scores.psnr.mean:5.1f} dB"
        self.console.print(
            f"  [{STYLES[run.verdict]}]{run.verdict:<17}[/] {run.attack:<20} {run.letter:<2}"
            f"{psnr:<9} {run.seconds:6.1f} s  [dim]{run.setting}[/]",
            highlight=False,
            no_wrap=True,
            overflow="ellipsis",
        )
        self.progress.advance(self._all)


def verdict_table(report: Report) -> Table:
    """The verdict by threat model."""
    table = Table(title="Who can see what", title_justify="left")
    for column in ("", "verdict", "attack", "best image", "set-up"):
        table.add_column(column)
    for verdict in report.verdicts():
        run = None if verdict.run is None else report.runs[verdict.run]
        best = "" if run is None or run.scores is None else f"{run.scores.psnr.max:.1f} dB"
        table.add_row(
            verdict.letter,
            f"[{STYLES[verdict.verdict]}]{verdict.verdict}[/]",
            "" if run is None else run.attack,
            best,
            "" if run is None else run.setting,
        )
    return table
