"""``leakatlas recommend``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from leakatlas.cli import plain
from leakatlas.cli.audit import planned, with_bars
from leakatlas.cli.codes import FINE, GATE_FAILED, UNDECIDED
from leakatlas.cli.options import DEVICE
from leakatlas.cli.plain import escape
from leakatlas.cli.recorded import Recorded

if TYPE_CHECKING:
    from leakatlas.audit.recommend import Advice, Recommendation

OUT = Path("leak-recommendation")
STYLE = {"keeps": "green", "breaks": "red", "undecided": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(recommend)


def recommend(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of an audit; its fail_on is the aim.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = OUT,
    budget: Annotated[
        str | None, typer.Option(help="30s, 10m, 1h; the file's if left out.")
    ] = None,
    threat: Annotated[str | None, typer.Option(help="Letters, such as A-E or B,F.")] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="A further condition that must not hold, e.g. 'P(psnr > 20) > 0.05'."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try every defense on a set-up: which keep the conditions of fail_on, and at what price?

    Those that stopped most on the frontier (studies/frontier) come first. The strongest attacks on
    the set-up as it is are run again under each defense, by an adversary who knows it, and the
    accuracy that it costs is measured on a small reference task, or on one's own (utility: own).

    Exit code 0: something keeps every condition; 1: nothing does; 2: bad input; 3: undecided.
    """
    from leakatlas.audit import parse_gate
    from leakatlas.audit.recommend import recommend as tried

    gates = [parse_gate(text) for text in fail_on or []]
    no_capture = Recorded(None, None, None, None, None, ())
    plan, asked = planned(
        config, no_capture, budget, threat, seed, None, None, device, out, command="recommend"
    )
    gates += [parse_gate(text) for text in asked]
    console = plain.console(stderr=True)
    found = with_bars(
        console,
        lambda listener, stop: tried(
            plan, gates, out=out, listener=listener, stop=stop, begun=context.obj
        ),
        silent=as_json,
    )
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        _show(found, out, console)
    if found.kept or found.as_it_is.finding == "keeps":
        raise typer.Exit(FINE)
    raise typer.Exit(UNDECIDED if found.undecided else GATE_FAILED)


def _show(found: Recommendation, out: Path, console: Console) -> None:
    table = Table()
    table.add_column("defense", overflow="fold")
    table.add_column("conditions", no_wrap=True)
    for condition in found.conditions:
        table.add_column(escape(condition), justify="right")
    table.add_column("images", justify="right")
    table.add_column("accuracy", justify="right")
    known = any(advice.expected for advice in found.advice)
    if known:
        table.add_column("on the frontier", overflow="fold")
    for advice in (found.as_it_is, *found.advice):
        table.add_row(
            escape(advice.name),
            f"[{STYLE[advice.finding]}]{advice.finding}[/]",
            *("-" if value is None else f"{value:.3g}" for value in advice.values),
            str(advice.images or "-"),
            _accuracy(advice),
            *([escape(advice.expected) or "-"] if known else ()),
        )
    console.print(table)
    if found.advice and not known:
        words = "The frontier's figures are not at hand (results/frontier.json); the order is free."
        console.print(words, style="dim", markup=False, highlight=False)
    alike: dict[str, list[str]] = {}
    for advice in found.advice:
        if advice.reason:
            alike.setdefault(advice.reason, []).append(advice.name)
    for reason, names in alike.items():
        words = f"{'; '.join(names)}: {reason}"
        console.print(words, style="dim", markup=False, highlight=False)
    for key, why in found.left_out.items():
        words = f"{key} was not tried: {why}"
        console.print(words, style="dim", markup=False, highlight=False)
    console.print(_words(found), markup=False, highlight=False)
    console.print(f"Report: {escape(str(out / 'report.html'))}")


def _accuracy(advice: Advice) -> str:
    if advice.accuracy is None:
        return "-"
    return f"{advice.accuracy:.3f}" + (
        "" if advice.points is None else f" ({-advice.points:+.1f} points)"
    )


def _words(found: Recommendation) -> str:
    """The answer in a sentence."""
    if found.as_it_is.finding == "keeps":
        return (
            "No condition holds on the set-up as it is, so nothing was added. That proves nothing "
            "about attacks that were not tried."
        )
    if not any(advice.finding in ("keeps", "breaks") for advice in found.advice):
        return (
            "No defense was tried to its end, so nothing is decided; a longer --budget would try "
            "those first that stopped most on the frontier."
        )
    if not found.kept:
        return "No defense that was tried keeps every condition here."
    best = found.kept[0]
    unpriced = sum(advice.points is None for advice in found.kept if advice is not best)
    among = f" ({unpriced} more keep them, at a price that was not measured)" if unpriced else ""
    return (
        f"{best.name} is the cheapest that keeps every condition{among}: "
        f"{_price(best, found.task)}. It was tried against the attacks that are strongest on the "
        "set-up as it is, by an adversary who knows it; put it into defenses and audit that set-up "
        "before you rely on it."
    )


def _price(advice: Advice, task: str) -> str:
    if advice.points is None:
        return "its price in accuracy is not known"
    return f"it costs {advice.points:.1f} points of accuracy on {task}"
