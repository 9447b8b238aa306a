"""The catalogue on the command line: list, show, cite, table, export, validate, site.

Tables for people, ``--json`` for machines. Exit codes: 0 fine, 1 ``validate`` found something to
repair, 2 bad input.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from leakatlas import reading
from leakatlas.cli import plain
from leakatlas.cli.plain import escape
from leakatlas.errors import InvalidInput, LeakAtlasError, UnknownName

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Write JSON for machines.")]
Printed = Annotated[
    bool, typer.Option("--printed", help="Show the published values, without corrections.")
]
ResultsFolder = Annotated[
    Path | None,
    typer.Option("--results", help="Folder of measured results.", show_default="results/"),
]

site_app = typer.Typer(help="The catalogue as a static site.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the catalogue's commands to the application."""
    app.command("list")(list_rows)
    app.command("show")(show)
    app.command("cite")(cite)
    app.command("table")(table)
    app.command("export")(export)
    app.command("validate")(validate)
    app.add_typer(site_app, name="site")


def _polite(command: Callable[P, R]) -> Callable[P, R]:
    """Say what LeakAtlas raised on purpose in one message, and leave with 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except LeakAtlasError as error:
            plain.console(stderr=True).print(
                f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True
            )
            raise typer.Exit(2) from None

    return wrapped


def _emit(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


@_polite
def list_rows(
    kind: Annotated[str | None, typer.Option(help="attack or defense; both if left out.")] = None,
    threat_model: Annotated[
        str | None, typer.Option("--threat-model", "-t", help="Attacks of this letter, A-H.")
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", "-a", help="Attacks on fedsgd or fedavg.")
    ] = None,
    knowledge: Annotated[
        str | None, typer.Option(help="Attacks that hold this knowledge, e.g. surrogate.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="E.g. analytic, heuristic.")] = None,
    technique: Annotated[str | None, typer.Option(help="E.g. latent, perturbation.")] = None,
    mechanism: Annotated[str | None, typer.Option(help="E.g. binning, gradient-matching.")] = None,
    label_recovery: Annotated[
        str | None, typer.Option(help="new, assumed, optimised, none, row.")
    ] = None,
    holds_against: Annotated[
        str | None, typer.Option(help="Defenses whose printed stance holds against this letter.")
    ] = None,
    implemented: Annotated[
        bool | None, typer.Option("--implemented/--not-implemented", help="Has a module here.")
    ] = None,
    tested: Annotated[
        bool | None, typer.Option("--tested/--not-tested", help="Its module has a test here.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", "-w", help="COLUMN=VALUE on any column; repeatable."),
    ] = None,
    search: Annotated[str, typer.Option("--search", "-s", help="Words that must occur.")] = "",
    printed: Printed = False,
    as_json: Json = False,
) -> None:
    """List attacks and defenses, filtered on any column.

    Example: leakatlas list --threat-model D --algorithm fedavg --implemented
    """
    from leakatlas.catalogue import facets, loader

    wanted: dict[str, Any] = {
        "kind": kind,
        "threat_model": threat_model and loader.threat_model(threat_model).letter,
        "algorithm": algorithm,
        "knowledge": knowledge,
        "category": category,
        "technique": technique,
        "mechanism": mechanism,
        "label_recovery": label_recovery,
        "holds": holds_against and loader.threat_model(holds_against).letter,
        "implemented": implemented,
        "tested": tested,
    }
    wanted = {column: value for column, value in wanted.items() if value is not None}
    every = facets.records(printed=printed)
    for column, value in wanted.items():
        _check_choice(column, value, every)
    for condition in where or ():
        column, equals, value = condition.partition("=")
        if not equals:
            raise InvalidInput(
                f"--where {condition!r} is no condition; write COLUMN=VALUE, e.g. year=2024."
            )
        wanted[column.strip()] = value.strip()
    found = facets.select(every, wanted, search)
    if as_json:
        _emit(found)
        return
    grid = Table(title=f"{len(found)} of {len(every)} rows", title_justify="left")
    for column in ("key", "no.", "name", "path", "threat model", "algorithm", "module"):
        grid.add_column(column, no_wrap=column in ("key", "no."), overflow="fold")
    for row in found:
        attack = row["kind"] == "attack"
        plain.row(
            grid,
            row["key"],
            "new" if row["number"] is None else str(row["number"]),
            f"{row['name']}, {row['year'] or 'n/a'}",
            f"{row['category']}/{row['technique']}",
            row["threat_model"] if attack else _holding(row),
            "+".join(row["algorithm"]) if attack else "",
            "yes" if row["implemented"] else "no",
        )
    plain.console().print(grid)


def _holding(row: dict[str, Any]) -> str:
    """Against whom a defense holds, as printed."""
    if row["origin"] != "published":
        return "not printed"
    return f"holds: {''.join(row['holds']) or 'none'}"


def _check_choice(column: str, value: Any, rows: list[dict[str, Any]]) -> None:
    """Refuse a value that no row has: a typing error must not look like an empty answer."""
    if isinstance(value, bool):
        return
    known: set[str] = set()
    for row in rows:
        held = row.get(column)
        known.update(map(str, held) if isinstance(held, list) else [str(held)] if held else [])
    if str(value).casefold() not in {name.casefold() for name in known}:
        raise UnknownName(column.replace("_", " "), value, known)


@_polite
def show(
    key: Annotated[str, typer.Argument(help="Key, alias or number of a row; or a letter A-H.")],
    printed: Printed = False,
    results_folder: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Show one row: facts, corrections, parameters, reported beside measured."""
    from leakatlas.catalogue import export as exporting
    from leakatlas.catalogue import loader, results, tables

    measured = results.load(results_folder or results.default_folder())
    kind, row = _row(key)
    if as_json:
        values = {
            "threat model": lambda: exporting.threat_model(row),
            "attack": lambda: exporting.attack(row, measured),
            "defense": lambda: exporting.defense(row, measured),
            "reference": lambda: exporting.reference(row),
        }
        _emit(values[kind]())
        return
    if printed and not tables.is_printed(row):
        raise InvalidInput(
            f"{tables.name_of(row)} was added by LeakAtlas; nothing of it is printed. "
            "Leave --printed out."
        )
    shown = row if printed else row.corrected()
    cells = tables.cells_of(shown)
    console = plain.console()
    grid = Table(
        title=escape(f"{kind}: {tables.name_of(row)}"), title_justify="left", show_header=False
    )
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for column, cell in cells.items():
        plain.row(grid, column, cell)
    if kind == "attack":
        plain.row(grid, "Title", loader.reference(row.reference).corrected().title)
        plain.row(grid, "Idea", row.summary)
    if kind in ("attack", "defense"):
        for name, text in _standing(row):
            plain.row(grid, name, text)
        _show_code(grid, "attack" if kind == "attack" else "defense", row)
    for evidence in getattr(row, "evidence", ()):
        works = ", ".join(map(tables.mark, evidence.works))
        plain.row(
            grid,
            f"[{works}] on {', '.join(evidence.letters)}",
            f"{evidence.stance}: {evidence.text}",
        )
    for note in row.notes:
        plain.row(grid, "Note", note)
    console.print(grid)
    if row.corrections:
        corrections = Table(title="Corrections", title_justify="left")
        for column in ("cell", "printed", "corrected", "reason"):
            corrections.add_column(column, overflow="fold")
        for change in tables.changes(row):
            plain.row(corrections, change.column, change.printed, change.corrected, change.reason)
        console.print(corrections)
    if kind in ("attack", "defense"):
        _show_numbers(console, row, results.of_row(measured, kind, row.key))


def _row(key: str) -> tuple[str, Any]:
    from leakatlas.catalogue import loader

    if len(key) == 1 and key.isalpha():
        return "threat model", loader.threat_model(key)
    for kind, find in (("attack", loader.attack), ("defense", loader.defense)):
        try:
            return kind, find(key)
        except UnknownName:
            continue
    try:
        work = loader.reference(key)
    except UnknownName:
        known = [row.key for row in (*loader.attacks(), *loader.defenses())]
        raise UnknownName("row", key, known) from None
    for defense in loader.defenses():
        if work.key in defense.works:
            return "defense", defense
    return "reference", work


def _standing(row: Any) -> Iterator[tuple[str, str]]:
    """What a reader must know of a row's place among the others."""
    if row.origin != "published":
        yield "Origin", f"{row.origin}; added by LeakAtlas"
    if getattr(row, "ships_in", ""):
        yield "Ships in", row.ships_in
    if row.superseded_by is not None:
        yield "Superseded by", row.superseded_by
    if (row.modality, row.payload) != ("image", "full"):
        yield "Reconstructs", f"{row.modality}; of the model travels: {row.payload}"


def _show_code(grid: Table, kind: Any, row: Any) -> None:
    from leakatlas.catalogue import registry, source

    found = source.of(kind, row.key)
    if found is None:
        grid.add_row("Module", "planned" if row.planned else "none")
        return
    plain.row(grid, "Module", f"{registry.module_path(kind, row.key)}:{found.class_name}")
    plain.row(grid, "Version", str(found.version))
    if found.needs:
        plain.row(grid, "Needs", ", ".join(found.needs))
    if found.departs_from_letter:
        plain.row(grid, "Departs from its letter", found.departs_from_letter)
    for parameter in found.parameters:
        default = f" = {parameter.default}" if parameter.default else ""
        plain.row(grid, f"  {parameter.name}", f"{parameter.annotation}{default}  {parameter.text}")


def _show_numbers(console: Console, row: Any, measured: Any) -> None:
    if row.reported:
        grid = Table(title="Reported by the authors", title_justify="left")
        for column in ("measure", "value", "setting", "source"):
            grid.add_column(column, overflow="fold")
        for claim in row.reported:
            plain.row(
                grid, claim.measure, f"{claim.value:g} {claim.unit}", claim.setting, claim.source
            )
        console.print(grid)
    if measured:
        grid = Table(title="Measured by LeakAtlas", title_justify="left")
        for column in ("measure", "value", "interval", "n", "command", "state"):
            grid.add_column(column, overflow="fold")
        for result in measured:
            for measure in result.measures:
                interval = (
                    "" if measure.interval is None else "[{:.4g}, {:.4g}]".format(*measure.interval)
                )
                plain.row(
                    grid,
                    measure.title,
                    f"{measure.value:.4g} {measure.unit}",
                    interval,
                    str(measure.n),
                    result.again,
                    "carried over" * result.carried_over or ("stale" if result.stale else "fresh"),
                )
        console.print(grid)


@_polite
def cite(
    names: Annotated[
        list[str],
        typer.Argument(help="Keys, aliases or numbers of rows; or a run's folder or report.json."),
    ],
    as_json: Json = False,
) -> None:
    """BibTeX of rows, or of everything that a run really used."""
    from leakatlas.catalogue import citations

    wanted: dict[str, tuple[str, ...]] = {}
    for name in names:
        path = Path(name)
        if path.suffix == ".json" or reading.is_folder(path):
            for used, reasons in citations.used_in(path).items():
                wanted[used] = (*wanted.get(used, ()), *reasons)
        else:
            wanted.setdefault(name, ())
    if as_json:
        _emit(
            [
                {
                    "name": name,
                    "used_as": list(reasons),
                    "bibtex": [citations.bibtex(work) for work in citations.references_of(name)],
                }
                for name, reasons in wanted.items()
            ]
        )
        return
    typer.echo(citations.bibliography(wanted), nl=False)


@_polite
def table(
    name: Annotated[str, typer.Argument(help="threat-models, attacks, defenses or references.")],
    form: Annotated[
        str, typer.Option("--format", "-f", help="markdown, latex, html or csv.")
    ] = "markdown",
    mode: Annotated[str, typer.Option(help="printed (as published) or corrected.")] = "corrected",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one of the published tables."""
    from leakatlas.catalogue import tables

    if mode not in ("printed", "corrected"):
        raise UnknownName("mode", mode, ("printed", "corrected"))
    content = tables.table(name, "printed" if mode == "printed" else "corrected")
    if as_json:
        _emit([dict(zip(content.columns, row, strict=True)) for row in content.rows])
        return
    text = tables.render(content, form)
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(output, text)


@_polite
def export(
    form: Annotated[
        str, typer.Option("--format", "-f", help="json (everything) or schema (for editors).")
    ] = "json",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file.")
    ] = None,
    results_folder: ResultsFolder = None,
) -> None:
    """Write everything in the catalogue as JSON with a stable shape."""
    from leakatlas.catalogue import export as exporting
    from leakatlas.catalogue import schema

    if form == "json":
        value: Any = exporting.export(results_folder)
    elif form == "schema":
        value = schema.json_schema()
    else:
        raise UnknownName("format", form, ("json", "schema"))
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write(output, text)


@_polite
def validate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Rows (.toml), results (.json) or studies (.yaml); all there are if left out."
        ),
    ] = None,
    results_folder: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Check rows, modules, results and studies, and say everything that is wrong at once.

    A file of the catalogue, or named like one (attacks.toml), is checked in its place; any other
    .toml is checked as an addition to the catalogue.
    """
    from leakatlas.bench import study
    from leakatlas.catalogue import loader, results

    chosen = list(files or ())
    for path in chosen:
        if not reading.is_file(path):
            raise InvalidInput(
                f"There is no file {path}; give a .toml of rows, a result .json or a study .yaml."
            )
        if path.suffix not in (".toml", ".json", ".yaml"):
            raise InvalidInput(
                f"{path} is neither rows (.toml) nor a result (.json) nor a study (.yaml)."
            )
    rows = [path for path in chosen if path.suffix == ".toml"]
    measured = [path for path in chosen if path.suffix == ".json"]
    studied = [path for path in chosen if path.suffix == ".yaml"]
    if not chosen:
        measured = results.files(results_folder or results.default_folder())
        studied = list(study.find().values())
    _, problems = loader.check_files(rows)
    for path in studied:
        problems += study.check(path)[1]
    stale = []
    for path in measured:
        found, wrong = results.read(path)
        problems += wrong
        for result in found:
            if result.stale:
                stale.append(f"{path.name}: {_since(result)}; run again: {result.again}")
    if as_json:
        _emit({"problems": [problem.to_json() for problem in problems], "stale": stale})
    else:
        console = plain.console(soft_wrap=True)
        for problem in problems:
            console.print(escape(str(problem)), highlight=False)
        for note in stale:
            console.print(f"stale: {escape(note)}", highlight=False)
        checked = (
            len(measured) + len(studied) + (len(rows) if chosen else len(loader.shipped_texts()))
        )
        console.print(f"{checked} files checked, {len(problems)} problems, {len(stale)} stale.")
    if problems:
        raise typer.Exit(1)


def _since(result: Any) -> str:
    from leakatlas.catalogue import results

    if result.carried_over:
        return f"{result.key} was measured on {result.date}, before there were study files"
    if result.study:
        return f"the code behind the figures of {result.key} has changed since"
    now = results.current_version(result.kind, result.key)
    return (
        f"measured with version {result.code_version} of {result.key}, which is now version {now}"
    )


@site_app.command("build")
@_polite
def build_site(
    out: Annotated[Path, typer.Argument(help="Folder for the site; made if missing.")],
    results_folder: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Write the catalogue as a static site that works from any folder, without a network."""
    from leakatlas import site

    if reading.is_file(out):
        raise InvalidInput(f"{out} is a file; give a folder for the site.")
    pages = site.build(out, results_folder=results_folder)
    if as_json:
        _emit({"index": str(out / "index.html"), "pages": len(pages)})
    else:
        plain.console().print(f"{len(pages)} pages in {escape(str(out))}; open index.html.")


@site_app.callback()
def _site() -> None:
    """Keep ``build`` a sub-command although it is the only one."""


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}.") from None
