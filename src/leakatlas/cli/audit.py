"""``leakatlas audit`` and ``leakatlas doctor``."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from leakatlas.cli import plain, recorded
from leakatlas.cli.codes import FINE, GATE_FAILED, UNDECIDED
from leakatlas.cli.options import DEVICE
from leakatlas.cli.plain import escape
from leakatlas.errors import InvalidInput

if TYPE_CHECKING:  # torch takes a second to load; --help should not wait for it
    from collections.abc import Callable, Sequence

    from leakatlas.audit import Diagnosis, Listener, Plan, Watch
    from leakatlas.report import Report

OUT = Path("leak-report")
T = TypeVar("T")
OUTLOOKS = {"applicable": "green", "unknown": "yellow"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(audit)
    app.command()(doctor)


def audit(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; bundled photos and a small CNN if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = OUT,
    budget: Annotated[
        str | None,
        typer.Option(help="30s, 10m, 1h, or 'paper' for published presets without a limit."),
    ] = None,
    threat: Annotated[str | None, typer.Option(help="Letters, such as A-E or B,F.")] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Condition that fails the build, e.g. 'P(psnr > 20) > 0.05'."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    execution: Annotated[
        str | None,
        typer.Option(help="How slopes are computed: auto, eager, vmap, traced, compiled, finite."),
    ] = None,
    rehearsal: Annotated[
        bool | None,
        typer.Option(
            "--rehearsal/--no-rehearsal",
            help="Try attacks on public images first, and so choose variants and order (default).",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    allow_undecided: Annotated[
        bool,
        typer.Option("--allow-undecided", help="Warn instead of exit code 3 where too little ran."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
    captured: recorded.Captured = None,
    model: recorded.Model = None,
    truth: recorded.Truth = None,
    shape: recorded.Shape = None,
    client: recorded.Client = None,
    place: recorded.Seen = None,
    protocol: recorded.Protocol = None,
) -> None:
    """Attack a set-up and report what leaks, to whom, and what would stop it.

    Exit code 0: fine; 1: a --fail-on condition holds; 2: bad input; 3: undecided (nothing was
    tried for a letter, an attack crashed or lacked something, stopped early); 4: a defect of
    LeakAtlas. Ctrl-C keeps what was computed; the same command continues it.
    """
    from leakatlas.audit import carry_out, parse_gate
    from leakatlas.report import beside

    gates = [parse_gate(text) for text in fail_on or []]
    capture = recorded.Recorded(captured, model, truth, shape, client, protocol or (), place)
    plan, asked = planned(config, capture, budget, threat, seed, execution, rehearsal, device, out)
    if plan.task is not None and not plan.alternatives:
        raise InvalidInput(
            "utility says where the price of alternatives is measured, and the file names none; "
            "give alternatives, or ask leakatlas recommend for some."
        )
    gates += [parse_gate(text) for text in asked]
    console = plain.console(stderr=True)
    report = with_bars(
        console,
        lambda listener, stop: carry_out(
            plan, out=out, listener=listener, stop=stop, begun=context.obj
        ),
        silent=as_json,
    )
    failed = [gate for gate in gates if gate.holds(report.worst_case())]
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _show(report, out, console)
    for gate in failed:
        value = gate.value(report.worst_case())
        assert value is not None, "a gate holds on figures only"
        shown = beside(value, gate.threshold, 3, kind="g")
        console.print(f"[bold red]Failed:[/] {escape(gate.text)} (it is {shown}).", highlight=False)
    reasons = report.undecided()
    for reason in reasons:
        console.print(f"[bold yellow]Undecided:[/] {escape(reason)}.", highlight=False)
    if failed:
        raise typer.Exit(GATE_FAILED)
    raise typer.Exit(UNDECIDED if reasons and not allow_undecided else FINE)


# torch takes a second to load; --help and mistakes in the command line should not wait for it: what
# needs it is imported where it is used.


def planned(
    config: Path | None,
    capture: recorded.Recorded,
    budget: str | None,
    threat: str | None,
    seed: int | None,
    execution: str | None,
    rehearsal: bool | None,
    device: str | None,
    out: Path,
    *,
    command: str = "audit",
) -> tuple[Plan, Sequence[str]]:
    """The plan of a file under the options of the command line, and the file's own conditions."""
    from dataclasses import replace

    from leakatlas.audit import make_plan, parse_budget, parse_execution, read_config
    from leakatlas.audit.bundled import bundled_plan
    from leakatlas.devices import chosen
    from leakatlas.threat import threat_models

    words = ["leakatlas", command, *([str(config)] if config else []), *capture.words()]
    conditions: Sequence[str] = ()
    described = capture.config(config)
    if described is not None:
        plan = make_plan(described, base=Path(), command="")
    elif config is None:
        plan = bundled_plan()
    else:
        settings = read_config(config)
        conditions = settings.fail_on
        plan = make_plan(settings, base=config.parent, command="")
    if budget is not None:
        plan = replace(plan, seconds=parse_budget(budget))
        words += ["--budget", budget]
    if threat is not None:
        plan = replace(plan, letters=tuple(m.letter for m in threat_models(threat)))
        words += ["--threat", threat]
    if seed is not None:
        plan = replace(plan, seed=seed)
        words += ["--seed", str(seed)]
    if execution is not None:
        plan = replace(plan, execution=parse_execution(execution))
        words += ["--execution", execution]
    if rehearsal is not None:
        plan = replace(plan, rehearsal=rehearsal)
        words += ["--rehearsal" if rehearsal else "--no-rehearsal"]
    if device is not None or (described is None and config is None):
        plan = plan.on(chosen(device or "auto"))
    if device is not None:
        words += ["--device", device]
    return replace(plan, command=shlex.join([*words, "--out", str(out)])), conditions


def with_bars(console: Console, run: Callable[[Listener, Watch], T], *, silent: bool) -> T:
    """What ``run`` returns; a first signal ends it after its step, a second one at once."""
    from leakatlas.audit import Silent, Watch
    from leakatlas.cli.progress import Bars

    stop = Watch()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stop.stopped:
            raise KeyboardInterrupt
        console.print("\nStopping after this step; press Ctrl-C again to leave at once.")
        stop.stop()

    previous = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        if silent:
            return run(Silent(), stop)
        bars = Bars(console)
        with bars.progress:
            return run(bars, stop)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show(report: Report, out: Path, console: Console) -> None:
    """Verdicts, what separates them, and what was not tried."""
    from leakatlas.cli.progress import disowned, not_tried, realism_lines, verdict_table

    console.print(verdict_table(report))
    for line in disowned(report):
        console.print(line, markup=False, highlight=False)
    for found in report.realism:
        for line in realism_lines(found):
            console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"Report: {escape(str(out / 'report.html'))}")
    if not report.complete:
        console.print("Stopped early; the same command continues.")
    for words in report.spared():
        console.print(f"[yellow]Note:[/] {escape(words)}.", highlight=False)
    if left_out := not_tried(report):
        console.print(f"[dim]{left_out}[/]", highlight=False)


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; the bundled set-up if left out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    captured: recorded.Captured = None,
    model: recorded.Model = None,
    truth: recorded.Truth = None,
    shape: recorded.Shape = None,
    client: recorded.Client = None,
    place: recorded.Seen = None,
    protocol: recorded.Protocol = None,
) -> None:
    """Check a set-up in seconds: is it consistent, and which attacks can work at all?

    Exit code 0: consistent; 1: the update is not what the described client sends; 2: bad input.
    """
    from dataclasses import replace

    from leakatlas.audit import examine, make_plan, presets, read_config, require_feasible
    from leakatlas.audit.bundled import bundled_plan
    from leakatlas.audit.realism import NOT_YET, pair_of, realism_of
    from leakatlas.cli.progress import realism_lines
    from leakatlas.devices import chosen

    capture = recorded.Recorded(captured, model, truth, shape, client, protocol or (), place)
    described = capture.config(config)
    if described is not None:
        plan = make_plan(described, base=Path(), command="")
    elif config is None:
        plan = bundled_plan()
    else:
        settings = read_config(config)
        plan = make_plan(settings, base=config.parent, command="")
    if device is not None or (described is None and config is None):
        plan = plan.on(chosen(device or "auto"))
    console = plain.console()
    consistent = True
    found = {}
    for setting in plan.settings:
        attacks = presets(setting.attacks, plan.attack_parameters, published=False)
        stage = setting.readable().stage(letter=plan.letters[0], seed=plan.seed)
        require_feasible(stage, attacks, plan.seconds)
        diagnosis = examine(stage, attacks, letters=plan.letters)
        realism = realism_of(pair_of(setting, wanted=plan.upper_bound), silent=NOT_YET)
        found[setting.name] = {**diagnosis.to_json(), "realism": realism.to_json()}
        replay = diagnosis.replay
        consistent &= replay.expected
        if as_json:
            continue
        console.rule(escape(setting.name), align="left")
        mark = (
            "[green]consistent[/]" if replay.consistent else f"[yellow]{escape(replay.culprit)}[/]"
        )
        if not replay.expected:
            mark = f"[bold red]wrong: {escape(replay.culprit)}[/]"
        words = f" {escape(replay.explanation)}" if replay.explanation else ""
        if replay.residual is None:
            console.print(f"Replay of the true batch:{words}.")
        else:
            size = f"residual {replay.residual:.1e}"
            console.print(f"Replay of the true batch: {mark}, {size}.{words}")
        console.print(f"Loss: {escape(setting.protocol.loss.describe())}", highlight=False)
        for line in realism_lines(replace(realism, reason="")):
            console.print(line, markup=False, highlight=False)
        for name, value in diagnosis.facts.items():
            console.print(f"  {escape(name)}: {value:,.4g}", highlight=False)
        for finding in diagnosis.findings:
            console.print(f"  - {escape(finding)}", highlight=False)
        table = Table()
        for column in ("attack", "letter", "outlook", "why"):
            table.add_column(column)
        for key, start in diagnosis.outlooks.items():
            style = OUTLOOKS.get(start.word, "red")
            reason = escape(start.outlook.reason)
            table.add_row(
                escape(key), escape(start.letter) or "-", f"[{style}]{start.word}[/]", reason
            )
        console.print(table)
        _print_measures(console, diagnosis)
    if as_json:
        typer.echo(json.dumps(found))
    raise typer.Exit(FINE if consistent else GATE_FAILED)


def _print_measures(console: Console, diagnosis: Diagnosis) -> None:
    """What the update could give away, before any attack: value, direction, what it rests on."""
    from leakatlas.vulnerability import WORSE, value_in_words, words_of

    if diagnosis.measures:
        table = Table(title="Before any attack", title_justify="left")
        table.add_column("measure", ratio=3)
        table.add_column("value", no_wrap=True)
        table.add_column("worse", no_wrap=True)
        table.add_column("what it says, and what to mind", ratio=6)
        for measure in diagnosis.measures:
            title, meaning = words_of(measure)
            note = f" [dim]({escape(measure.note)})[/]" if measure.note else ""
            table.add_row(
                f"{escape(title)}\n[dim]{escape(measure.name)}[/]",
                value_in_words(measure),
                WORSE[measure.direction],
                f"{escape(meaning[:1].upper() + meaning[1:])}.{note}\n[dim]Mind: "
                f"{escape(measure.assumption)}.[/]",
            )
        console.print(table)
    console.print(escape(diagnosis.left_out), highlight=False)
