"""The command line: ``leakatlas audit``, ``doctor``, ``lint``, and the catalogue."""

from __future__ import annotations

import os

import typer

from leakatlas import openmp
from leakatlas.cli import audit, bench, capture, catalogue, clock, init, lint, prior, recommend
from leakatlas.cli.codes import Guarded

app = typer.Typer(
    name="leakatlas",
    cls=Guarded,
    help="What leaks from a federated learning set-up, to whom, and what would stop it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
audit.register(app)
recommend.register(app)
bench.register(app)
lint.register(app)
capture.register(app)
init.register(app)
prior.register(app)
catalogue.register(app)


def main() -> None:
    """Run a command; :mod:`leakatlas.cli.codes` says what its exit code means."""
    begun = clock.began()
    openmp.spin_briefly(os.environ)  # before a command loads torch
    app(obj=begun)
