"""The command line: ``leakatlas audit``, ``doctor``, ``lint``, and the catalogue."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from leakatlas.cli import audit, catalogue, lint
from leakatlas.errors import LeakAtlasError

app = typer.Typer(
    name="leakatlas",
    help="What leaks from a federated learning set-up, to whom, and what would stop it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
audit.register(app)
lint.register(app)
catalogue.register(app)


def main() -> None:
    """Run a command; errors on purpose become one line and exit code 2."""
    try:
        app()
    except LeakAtlasError as problem:
        console = Console(stderr=True)
        console.print(
            f"[bold red]{type(problem).__name__}:[/] {escape(str(problem))}", highlight=False
        )
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped. Finished runs are kept; the same command continues.")
        sys.exit(130)
