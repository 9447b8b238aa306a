"""``leakatlas lint``: was the model that I received made to leak?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from leakatlas.cli import plain
from leakatlas.cli.options import DEVICE
from leakatlas.cli.plain import escape

if TYPE_CHECKING:
    from leakatlas.data import Box, ImageSet
    from leakatlas.lint import Verdict
    from leakatlas.lint.examine import ModelOrState

NUMBERS = "one number for each channel, separated by commas, such as 0.49,0.48,0.45"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(lint)


def lint(
    model: Annotated[
        str,
        typer.Argument(
            help="Weights (safetensors, or torch.save of plain tensors), builtin:NAME, or "
            "file.py:factory. A state is judged by its weights; a batch needs a model that runs."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The agreed model, best that of the round before; as MODEL."),
    ] = None,
    previous: Annotated[
        str | None,
        typer.Option(help="What was received in the round before; as MODEL."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Own examples: folder:PATH@SIZE, parquet:PATH, photos:32."),
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="The update about to be sent, or a capture; needs --batch.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Received weights for builtin:NAME or file.py:factory."),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many own examples.")] = 64,
    mean: Annotated[str | None, typer.Option(help=f"Pixel normalisation: {NUMBERS}.")] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(help="What another client received: weights, or the SHA-256 of a state."),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Look for signs that a received model was made to leak your data.

    Exit code 0: nothing found; 1: alarm; 2: bad input. file.py:factory runs that file; weights
    files are read as plain tensors only.
    """
    # torch takes a second to load; --help should not wait for it.
    from torch import nn

    from leakatlas import data
    from leakatlas.errors import InvalidParameter
    from leakatlas.fl import state_hash
    from leakatlas.fl.capture import Capture
    from leakatlas.fl.intake import take_in
    from leakatlas.lint import lint as examine
    from leakatlas.lint.layers import anatomy
    from leakatlas.models.sizes import require_readable

    if limit < 1:
        raise InvalidParameter(f"--limit {limit}: expected a positive number of examples.")
    own = None if batch is None else data.load(batch, limit=limit)
    box = _box(mean, std)
    received = read_model(model, weights, classes=_classes(own), option="MODEL")
    if own is not None and isinstance(received, nn.Module):
        require_readable(take_in(received, own.images[:1]).model, own.shape)
    verdict = examine(
        received,
        reference=None
        if reference is None
        else read_model(reference, None, classes=_classes(own), option="--reference"),
        previous=None
        if previous is None
        else read_model(previous, None, classes=_classes(own), option="--previous"),
        batch=own,
        update=None if update is None else Capture.load(update).update,
        others=[_received(text) for text in other or []] or None,
        box=box,
        device=device,
    )
    if as_json:
        digest = state_hash(anatomy(received).state)
        typer.echo(json.dumps({**verdict.to_json(), "model": model, "state_sha256": digest}))
    else:
        _show(verdict, model, plain.console())
    raise typer.Exit(1 if verdict.alarm else 0)


def read_model(
    text: str, weights: Path | None, *, classes: int | None, option: str
) -> ModelOrState:
    """A state dict from a file, or a module that can be run.

    Args:
        text: As the command line has it.
        weights: Weights to put into the module.
        classes: Number of classes of a built-in model, if the weights do not tell.
        option: For messages.

    Raises:
        InvalidInput: If the file or the factory cannot be used, or weights do not fit.
        UnknownName: If there is no such built-in model.
    """
    from leakatlas import models, reading
    from leakatlas.errors import InvalidInput
    from leakatlas.fl import ModelRef, load_into

    kind, _, name = text.partition(":")
    held = None if weights is None else models.load_state(weights)
    if kind == "builtin":
        if name in models.shipped() and held is None:
            return models.pretrained(name)
        settings = {} if classes is None else {"classes": classes}
        if held is not None and "fc.weight" in held and held["fc.weight"].ndim == 2:
            settings["classes"] = len(held["fc.weight"])
        module = ModelRef("builtin", name, settings).build()
    elif name and not reading.is_file(text):
        module = ModelRef("python", text).build(trust_code=True)
    elif weights is not None:
        raise InvalidInput(
            f"{option} {text!r} is a file of weights already; --weights goes with builtin:NAME or "
            "file.py:factory."
        )
    else:
        return models.load_state(text)
    if held is None:
        return module
    fitted = models.fit_state(held, module, source=str(weights))
    for note in fitted.notes:
        typer.echo(f"Note: {note}.", err=True)
    return load_into(module, fitted.state)


def _received(text: str) -> str | ModelOrState:
    from leakatlas import models, reading

    return models.load_state(text) if reading.is_file(text) else text


def _classes(own: ImageSet | None) -> int | None:
    return None if own is None else max(len(own.classes), 2)


def _box(mean: str | None, std: str | None) -> Box | None:
    from leakatlas.data import Box
    from leakatlas.errors import InvalidParameter

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise InvalidParameter("--mean and --std go together; give both.")
    try:
        return Box(
            tuple(float(part) for part in mean.split(",")),
            tuple(float(part) for part in std.split(",")),
        )
    except ValueError as problem:
        if isinstance(problem, InvalidParameter):
            raise
        raise InvalidParameter(f"--mean {mean} --std {std}: expected {NUMBERS}.") from None


def _show(verdict: Verdict, model: str, console: Console) -> None:
    """The verdict for people."""
    name = escape(model)
    if verdict.alarm:
        console.print(f"[bold red]Alarm:[/] {name} looks tampered with.", highlight=False)
        for line in verdict.lines():
            console.print(f"  - {escape(line)}", highlight=False)
        table = Table()
        for column in ("check", "layer", "evidence", "score", "threshold"):
            table.add_column(column)
        for finding in verdict.findings:
            score = finding.score
            plain.row(
                table,
                score.statistic,
                score.place or "model",
                score.words,
                f"{score.value:.3f}",
                f"{finding.threshold:.3f}",
            )
        console.print(table)
        console.print("Do not train on it, and do not send the update; ask for its origin.")
    else:
        console.print(
            f"[green]No sign of tampering[/] in {name} ({len(verdict.scores)} statistics).",
            highlight=False,
        )
    for note in verdict.notes:
        console.print(f"  note: {escape(note)}", highlight=False)
    if verdict.skipped:
        reasons: dict[str, list[str]] = {}
        for check, reason in verdict.skipped.items():
            reasons.setdefault(reason, []).append(check)
        text = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        console.print(f"[dim]Not checked: {escape(text)}.[/]", highlight=False)
