"""``leakatlas init``: a commented file for one's own model, images or capture."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from leakatlas.cli import plain
from leakatlas.cli.plain import escape

SAMPLE = {"builtin": "lenet", "kwargs": {"size": 16, "classes": 8}}
"""What a file without ``--model`` audits: a small network that the package brings along."""
PHOTOS = "photos:16"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(init)


def init(
    file: Annotated[Path, typer.Argument(help="Where the file goes.")] = Path("audit.yaml"),
    model: Annotated[
        str | None, typer.Option(help="builtin name, or file.py:factory; a sample if left out.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="File with the model's weights.")] = None,
    victims: Annotated[
        str | None, typer.Option(help="Images: folder:PATH@SIZE, parquet:PATH, photos:16, ...")
    ] = None,
    capture: Annotated[
        Path | None,
        typer.Option("--from", help="A capture (leakatlas capture) instead of a simulated round."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Shape C,H,W of the images behind a capture.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="The client's learning rate.", min=1e-12)] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Keys with commas; every implemented one if left out.")
    ] = None,
    budget: Annotated[str, typer.Option(help="30s, 10m, 1h, or paper.")] = "5m",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented audit.yaml that runs as it is, and its JSON Schema for editors.

    Exit code 0: written; 2: the file exists, or what was given does not fit together.
    """
    from leakatlas.audit import parse_budget, read_config
    from leakatlas.audit.keys import SCHEMA_FILE, starter
    from leakatlas.errors import InvalidInput

    if file.exists() and not force:
        raise InvalidInput(f"{file} exists; choose another name, or overwrite it with --force.")
    parse_budget(budget)
    values: dict[str, Any] = {"model": _model(model, weights), "budget": budget}
    if attacks is not None:
        from leakatlas.catalogue import registry

        values["attacks"] = [registry.load_attack(key.strip()).key for key in attacks.split(",")]
    if capture is None:
        if shape is not None:
            raise InvalidInput("--shape belongs to --from; images bring their own shape.")
        values["data"] = {"victims": victims or PHOTOS, "limit": 2}
        values["protocol"] = {"algorithm": "fedavg", "epochs": 1, "batch_size": 2, "lr": lr or 0.01}
        values["threat"] = "C-H"
    else:
        values |= _captured(capture, file, victims, shape, lr)
        if model is None:
            raise InvalidInput("--from needs --model: the architecture that the update belongs to.")
    file.write_text(starter(values), encoding="utf-8")
    schema = file.with_name(SCHEMA_FILE)
    packaged = resources.files("leakatlas.audit") / SCHEMA_FILE
    schema.write_text(packaged.read_text(encoding="utf-8"), encoding="utf-8")
    read_config(file)
    console = plain.console()
    console.print(
        f"Written: {escape(str(file))}, and {escape(str(schema))} for your editor. Next: "
        f"leakatlas doctor {escape(str(file))}",
        highlight=False,
    )


def _model(model: str | None, weights: str | None) -> dict[str, Any]:
    if model is None:
        return {**SAMPLE, **({} if weights is None else {"weights": weights})}
    described: dict[str, Any] = {"python" if ":" in model else "builtin": model}
    return described if weights is None else {**described, "weights": weights}


def _captured(
    capture: Path, file: Path, victims: str | None, shape: str | None, lr: float | None
) -> dict[str, Any]:
    """The keys for an update that was recorded."""
    from leakatlas.errors import InvalidInput
    from leakatlas.fl.capture import Capture

    held = Capture.load(capture)
    if victims is None:
        texts = [] if shape is None else shape.replace(" ", "").split(",")
        sides = [int(text) for text in texts if text.isascii() and text.isdigit()]
        if len(sides) != 3 or len(texts) != 3:
            raise InvalidInput(
                "Nothing says which shape the images behind the capture have: give --shape C,H,W, "
                "or the images themselves with --victims."
            )
        images: dict[str, Any] = {"victims": "none", "shape": sides}
    else:
        images = {"victims": victims, "limit": held.num_examples}
    protocol: dict[str, Any] = {"algorithm": "fedsgd"}
    if held.update.kind != "gradient":
        protocol = {"algorithm": "fedavg", "batch_size": held.num_examples, "lr": lr or 0.01}
    try:
        named = capture.resolve().relative_to(file.resolve().parent)
    except ValueError:
        named = capture.resolve()
    return {"data": images, "protocol": protocol, "captured": str(named), "threat": "C-E"}
