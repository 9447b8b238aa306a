"""``leakatlas capture``: files of a real FL system, made into what audits and the doctor take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from leakatlas.cli import plain
from leakatlas.cli.plain import escape


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(capture)


def capture(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="One file (an update), or two: the state before and the state after. safetensors, "
            "torch.save of plain tensors, or npz; by name, or in the order of state_dict() or "
            "parameters(). Or captures of single rounds, oldest first, to be made one."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="builtin name, or file.py:factory; it gives the names.")
    ],
    examples: Annotated[int, typer.Option(help="Examples behind the update.", min=1)],
    weights: Annotated[
        Path | None, typer.Option(help="The state that the client received, for one file.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="gradient, delta or weights; found out if left out.")
    ] = None,
    reduction: Annotated[str, typer.Option(help="mean or sum, for a gradient.")] = "mean",
    sign: Annotated[int, typer.Option(help="-1 if the descent direction was sent.")] = 1,
    scale: Annotated[float, typer.Option(help="A positive factor that was applied.")] = 1.0,
    clients: Annotated[int, typer.Option(help="Clients averaged into it.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Where the capture goes.")] = Path(
        "capture.safetensors"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was understood.")] = False,
) -> None:
    """Make a capture of files from a real system, and say how they were understood.

    Exit code 0: written; 2: the files do not fit the model, or it is not clear what they hold.
    """
    from leakatlas.audit.intake import read_capture
    from leakatlas.errors import InvalidParameter
    from leakatlas.fl import ModelRef
    from leakatlas.fl.capture import facts_of
    from leakatlas.fl.state import load_into
    from leakatlas.models import load_for

    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("--kind", kind, (None, "gradient", "delta", "weights")),
        ("--reduction", reduction, ("mean", "sum")),
        ("--sign", sign, (1, -1)),
    ]
    for option, value, allowed in choices:
        if value not in allowed:
            known = ", ".join(str(a) for a in allowed if a is not None)
            raise InvalidParameter(f"{option} is one of {known}; got {value!r}.")
    reference = ModelRef("python" if ":" in model else "builtin", model)
    net = reference.build(trust_code=True)  # named as code on the command line
    if weights is not None:
        held = load_for(net, weights)
        net = load_into(net, held.state)
        for note in held.notes:
            typer.echo(f"Note: {note}.", err=True)
    arguments: dict[str, Any] = {"kind": kind, "reduction": reduction, "sign": sign}
    found = read_capture(
        files, net, num_examples=examples, scale=scale, clients=clients, **arguments
    )
    found.fitted(net)
    found.save(out)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **facts_of(found)}))
        return
    console = plain.console()
    facts = facts_of(found)
    for note in found.notes:
        console.print(f"Understood as {escape(note)}.", highlight=False)
    console.print(
        f"{facts['tensors']} tensors, kind {facts['kind']}, {facts['examples']} examples; written "
        f"to {escape(str(out))}. Put `captured: {escape(str(out))}` into the audit's YAML.",
        highlight=False,
    )
