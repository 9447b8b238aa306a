"""``leakatlas bench``: studies, what there is of them, and running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from leakatlas.cli import plain
from leakatlas.cli.options import DEVICE
from leakatlas.cli.plain import escape
from leakatlas.errors import InvalidParameter, LeakAtlasError

if TYPE_CHECKING:  # torch takes a second to load; --help should not wait for it
    from leakatlas.bench.runner import Options, Standing
    from leakatlas.bench.study import Study


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    study: Annotated[
        str | None, typer.Argument(help="A study: its name, its folder, or its study.yaml.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only cases of this name; * and ? stand for anything. Of several, the first is "
            "run first."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time on this machine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, 'auto', or 'local' to start one here."),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "cpu",
    limit: Annotated[
        str | None,
        typer.Option(help="30s, 10m, 1h: no further cell is begun after it; running ones end."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the data sets.", show_default="$LEAKATLAS_DATA"),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder for result files.", show_default="results/")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run a study.py that is not in studies/.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="List studies and their state.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="List studies that have something to run, and why.")
    ] = False,
    differential: Annotated[
        bool,
        typer.Option(
            "--differential",
            help="Compare with figures of official code: every row, or the one that is named.",
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--confirm",
            help="Make one cell of every stale case again; where it comes out equal bit for bit, "
            "the case's other figures count as current and say so.",
        ),
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Run everything that is left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a study, from where it stopped: one set-up, its axes, every combination scored alike.

    Exit code 0: every cell has a record; 1: a figure differs from official code; 2: bad input; 3:
    cells are left, some crashed, or a comparison cannot be made again. Ctrl-C loses the cells that
    are being run and nothing else; the same command continues.
    """
    if differential and not (show or stale or every):
        raise typer.Exit(_differential(study, results, as_json))
    if sum((study is not None, show, stale, every)) != 1 or differential:
        raise InvalidParameter(
            "Give one study, or one of --list, --stale, --all and --differential."
        )
    from leakatlas.bench.runner import Options
    from leakatlas.bench.study import find, load
    from leakatlas.blocks.watch import parse_budget

    given: dict[str, Any] = {"data": data, "results": results}
    options = Options(
        only=only or None,
        workers=workers,
        ray=ray,
        device=device,
        seconds=parse_budget(limit),
        trust_code=trust_code,
        **{name: value for name, value in given.items() if value is not None},
    )
    if again and (show or stale or ray is not None):
        raise InvalidParameter("--confirm goes with a study or --all, on this machine.")
    if study is not None and not again:
        ended = _run([load(study)], options, as_json)
    else:
        studies = [load(study)] if study else [load(path) for path in find().values()]
        if again:
            ended = _confirm(studies, options, as_json)
        elif every:
            ended = _run(studies, options, as_json)
        else:
            ended = _table(studies, options, only_stale=stale, as_json=as_json)
    raise typer.Exit(0 if ended else 3)


def _differential(row: str | None, folder: Path | None, as_json: bool) -> int:
    """Compare with official code, and say what cannot be compared again; the exit code."""
    from leakatlas.bench.differential import compare, ours, stored

    known = stored(folder)
    mine = ours()
    chosen = list(known) if row is None else [row]
    found = {name: compare(name, known, mine) for name in chosen}
    recorded = [name for name, comparisons in found.items() if not comparisons]
    flat = [comparison for comparisons in found.values() for comparison in comparisons]
    apart = [comparison for comparison in flat if not comparison.equal]
    if as_json:
        facts = [{**vars(c), "difference": c.difference, "equal": c.equal} for c in flat]
        typer.echo(json.dumps({"compared": facts, "recorded_only": recorded}))
    else:
        table = Table()
        for column in ("row", "figure", "official", "ours", "difference", "allowed", "equal"):
            table.add_column(column, overflow="fold")
        for c in flat:
            numbers = (f"{c.official:.6g}", f"{c.ours:.6g}", f"{c.difference:.1e}")
            plain.row(
                table, c.row, c.name, *numbers, f"{c.tolerance:.0e}", "yes" if c.equal else "NO"
            )
        console = plain.console()
        console.print(table)
        console.print(f"{len(flat)} figures compared, {len(apart)} apart.", highlight=False)
        for name in recorded:
            console.print(
                f"{escape(name)}: recorded on {escape(known[name].date)}, cannot be compared again "
                "(its official figures need released files, or were not kept).", highlight=False,
            )  # fmt: skip
    return 1 if apart else 3 if recorded else 0


def _run(studies: list[Study], options: Options, as_json: bool) -> bool:
    """Run studies one after the other; whether all of their cells have ended well."""
    from leakatlas.bench.runner import run_study, standing
    from leakatlas.cli.progress import Cells

    console = plain.console(stderr=True)
    whole = True
    told = []
    for study in studies:
        left = standing(study, options).left
        with Cells(console, study.name, total=len(left), quiet=as_json) as sink:
            after = run_study(study, options, sink)
        whole &= not after.left
        told.append(_facts(study, after))
        if not as_json:
            _summary(console, study, after, options)
    if as_json:
        typer.echo(json.dumps(told))
    return whole


def _confirm(studies: list[Study], options: Options, as_json: bool) -> bool:
    """Confirm studies one after the other; whether no stale case is left."""
    from leakatlas.bench.confirm import confirm
    from leakatlas.bench.runner import standing
    from leakatlas.cli.progress import Cells

    console, told = plain.console(stderr=True), []
    for study in studies:
        if not standing(study, options).stale:
            continue
        with Cells(console, study.name, total=len(study.cases), quiet=as_json) as sink:
            found = confirm(study, options, sink)
        told.append({"study": study.name, **vars(found)})
        if not as_json:
            console.print(
                f"{escape(study.name)}: {len(found.equal)} cases confirmed, {len(found.apart)} "
                f"came out otherwise, {len(found.left)} not made again.",
                highlight=False,
            )
    if as_json:
        typer.echo(json.dumps(told))
    return not any(one["apart"] or one["left"] for one in told)


def _summary(console: Console, study: Study, after: Standing, options: Options) -> None:
    from leakatlas.bench.runner import elsewhere

    facts = _facts(study, after)
    ends = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in facts["status"].items())
    console.print(
        f"{escape(study.name)}: {len(after.cells)} cells, {ends or 'none run'}; "
        f"{len(after.left)} left.",
        highlight=False,
    )
    for reason in facts["reasons"]:
        console.print(f"  {escape(reason)}", highlight=False)
    path = options.results / f"{study.name}.json"
    if path.is_file():
        words = f"{path}. {elsewhere(study, options)}".removesuffix(". ")
        console.print(f"Figures: {escape(words)}", highlight=False)


def _facts(study: Study, now: Standing) -> dict[str, Any]:
    """How far a study is, for machines."""
    mine = [now.records[cell.name] for cell in now.cells if cell.name in now.records]
    status: dict[str, int] = {}
    for record in mine:
        status[record.status] = status.get(record.status, 0) + 1
    return {
        "study": study.name,
        "title": study.file.title,
        "cases": len(study.cases),
        "cells": len(now.cells),
        "left": len(now.left),
        "stale": now.stale,
        "status": dict(sorted(status.items())),
        "reasons": sorted({r.reason for r in mine if r.status in ("error", "refused")})[:5],
    }


def _table(studies: list[Study], options: Options, *, only_stale: bool, as_json: bool) -> bool:
    from leakatlas.bench.runner import standing

    facts = []
    for study in studies:
        try:
            facts.append(_facts(study, standing(study, options)))
        except LeakAtlasError as problem:  # one study's trouble must not hide the others
            facts.append({"study": study.name, "title": study.file.title, "problem": str(problem)})
    if only_stale:
        facts = [f for f in facts if f.get("left") or f.get("problem")]
    if as_json:
        typer.echo(json.dumps(facts))
        return True
    table = Table()
    for column in ("study", "title", "cases", "cells", "left", "of old code", "errors"):
        table.add_column(column, overflow="fold")
    for f in facts:
        if "problem" in f:
            plain.row(table, f["study"], f["problem"])
            continue
        plain.row(
            table, f["study"], f["title"],
            *(str(f[k]) for k in ("cases", "cells", "left", "stale")),
            str(f["status"].get("error", 0)),
        )  # fmt: skip
    plain.console().print(table)
    return True
