"""``leakatlas prior train``: a generative prior of one's own population."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table

from leakatlas.cli import plain
from leakatlas.cli.options import DEVICE
from leakatlas.cli.plain import escape

if TYPE_CHECKING:
    from leakatlas.blocks.watch import Watch
    from leakatlas.data import ImageSet
    from leakatlas.models import Card
    from leakatlas.priors.training import Recipe

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

commands = typer.Typer(
    name="prior",
    help="Generative priors: what an adversary with public images knows of a population.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(commands)


@commands.command()
def train(
    data: Annotated[
        str, typer.Argument(help="Public images: folder:PATH@SIZE, parquet:PATH, patches:64:2000.")
    ],
    kind: Annotated[
        str, typer.Option(help="vae (closest to given images), gan (sharpest), ddpm (diffusion).")
    ] = "vae",
    size: Annotated[
        int | None,
        typer.Option(help="Side of its images, a multiple of 8; the data's if left out."),
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Average colours away.")] = False,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Condition a gan on the labels.")
    ] = False,
    latent: Annotated[
        int | None, typer.Option(help="Length of the latent; 128 if left out.", min=1, max=4096)
    ] = None,
    width: Annotated[int, typer.Option(help="Factor on its feature maps.", min=1, max=64)] = 1,
    batch: Annotated[
        int | None, typer.Option(help="Images in a step; 32 or 64 if left out.", min=2)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 2_000,
    budget: Annotated[
        str | None, typer.Option(help="Time, such as 20m; fewer steps, under the whole schedule.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many images, from the first.")
    ] = None,
    flips: Annotated[bool, typer.Option(help="Mirror images at random.")] = True,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = 0,
    patience: Annotated[
        int | None,
        typer.Option(
            help="A gan ends after so many looks at its inversion PSNR without a better one, and "
            "keeps the best weights; 5 if left out, 0 for a fixed length.",
            min=0,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the prior.")] = "prior",
    source: Annotated[str, typer.Option(help="What the images are, for the card.")] = "",
    license: Annotated[
        str, typer.Option(help="Licence of the weights, as the data allow.")
    ] = "unknown",
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for weights and card.")] = Path("prior"),
) -> None:
    """Learn a prior on public images; a run that was stopped goes on where it was.

    Writes NAME.safetensors, its provenance card NAME.json and NAME.seen, fingerprints of the
    images. An attack takes it as `prior: FOLDER`; a victim that it was trained on is refused.
    Exit code 2: bad input.
    """
    # torch takes a second to load; --help should not wait for it.
    from leakatlas import data as room
    from leakatlas import devices, priors
    from leakatlas.errors import UnknownName
    from leakatlas.metrics import likeness
    from leakatlas.priors import stopping, training
    from leakatlas.priors.learning import KINDS

    if kind not in KINDS:
        raise UnknownName("kind of prior", kind, KINDS)
    _check(kind, name=name, size=size, latent=latent, patience=patience)
    images = room.load(data, limit=limit)
    recipe = training.Recipe(
        kind=kind, size=size, grey=grey, conditional=conditional, latent=latent or 128, width=width,
        batch=batch, steps=steps, flips=flips, seed=seed,
        patience=stopping.PATIENCE if patience is None else patience,
    )  # fmt: skip
    console = plain.console(stderr=True)
    checkpoint = _checkpoint(out, name, images, recipe)
    if others := [file for file in out.glob(f".{name}.*training") if file != checkpoint]:
        console.print(
            f"{escape(str(others[0]))} is of a training on other images, or of another recipe; "
            "this one starts anew and leaves it there."
        )
    with _progress(f"{kind} on {len(images):,} images", budget) as watch:
        prior = training.train(
            images, recipe, name=name, license=license, watch=watch, checkpoint=checkpoint,
            command=_command(data, limit, name, recipe), source=source,
            device=devices.chosen(device),
        )  # fmt: skip
    if isinstance(prior, priors.Prior):
        prior.card.figures.update(likeness.of_prior(prior, images.images, images.labels))
    card = priors.save(prior, out)
    checkpoint.unlink(missing_ok=True)
    _show(card, out, watch.planned, steps)


@contextmanager
def _progress(told: str, budget: str | None = None) -> Iterator[Watch]:
    """A bar of what is told to the watch."""
    from leakatlas.blocks.watch import Watch, parse_budget

    columns = (plain.Words(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=plain.console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(told), total=1.0)

        def listen(fraction: float, note: str) -> None:
            now = f"{told}: {note}" if note else told
            progress.update(task, completed=fraction, description=escape(now))

        yield Watch(parse_budget(budget), listen)


def _check(
    kind: str, *, name: str, size: int | None, latent: int | None, patience: int | None
) -> None:
    """Refuse options out of their range, and those that this kind has no use for."""
    from leakatlas.errors import InvalidParameter

    if not NAME.fullmatch(name):
        raise InvalidParameter(
            f"--name {plain.escape(name)}: expected lower-case letters, digits, dots and dashes."
        )
    if size is not None and (size < 8 or size % 8 or size > 1024):
        raise InvalidParameter(f"--size {size}: expected a multiple of 8, 1024 at the most.")
    if latent is not None and kind == "ddpm":
        raise InvalidParameter(f"--latent {latent}: a prior of kind ddpm has no latent.")
    if patience is not None and kind != "gan":
        raise InvalidParameter(
            f"--patience {patience}: a prior of kind {kind} ends with its schedule; only a gan is "
            "stopped."
        )


@commands.command()
def measure(
    prior: Annotated[str, typer.Argument(help="A shipped prior, a folder, or a card.")],
    data: Annotated[
        str, typer.Argument(help="Images of its population: folder:PATH@SIZE, parquet:PATH.")
    ],
    limit: Annotated[
        int | None, typer.Option(help="At most so many images, from the first.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Onto its card, where that says nothing yet.")
    ] = False,
) -> None:
    """How close a prior comes to images that it has not seen, and how alike its pictures are.

    Of one of others nobody knows what it has seen: give images that are in no data set of the time.
    Exit code 2: bad input.
    """
    from leakatlas import data as room
    from leakatlas import priors
    from leakatlas.errors import InvalidInput, InvalidParameter
    from leakatlas.metrics import likeness
    from leakatlas.models import checkpoints
    from leakatlas.priors import kept
    from leakatlas.priors.prior import INVERTED
    from leakatlas.priors.training import STOPPED

    found, images = kept.load(prior), room.load(data, limit=limit)
    card = kept.card_file(prior)
    if write and card is None:
        raise InvalidParameter(
            f"--write: {escape(prior)} has no card but its recipe; write inversion_psnr there."
        )
    strangers = images.subset(
        (~found.knows(images.images)).nonzero().flatten().tolist()[-INVERTED:]
    )
    if not len(strangers):
        raise InvalidInput(f"{escape(prior)} was trained on every image of {escape(data)}.")
    figures: dict[str, float] = {}
    if isinstance(found, priors.Prior):  # a denoiser has no latent to seek
        psnr = priors.inversion_psnr(found, strangers.images.float(), strangers.labels)
        figures[priors.CEILING] = round(psnr, 2)
    with _progress(f"pictures of {found.card.name}") as watch:
        figures.update(likeness.of_prior(found, images.images, images.labels, watch=watch))
    table = Table(title=f"Prior {found.card.name}", show_header=False)
    plain.row(table, "images that it has not seen", f"{len(strangers)}")
    for figure, value in figures.items():
        plain.row(table, figure.replace("_", " "), f"{value:g}")
    console = plain.console()
    console.print(table)
    if write and card is not None:
        said = {**found.card.figures}
        for figure, value in {**figures, STOPPED: 0}.items():
            said.setdefault(figure, value)
        whole = {figure: int(v) if v == int(v) else v for figure, v in said.items()}
        checkpoints.write_card(replace(found.card, figures=whole), card)
        console.print(f"Written to {escape(str(card))}; what it said before stays.")


@commands.command("list")
def list_() -> None:
    """The priors in the package: what they draw, what they saw, how close they come."""
    from leakatlas.models import checkpoints
    from leakatlas.priors import CEILING, kept
    from leakatlas.priors.training import STOPPED

    table = Table(title="Shipped priors")
    for column in (
        "prior", "draws", "trained on", "until", "closest picture (dB)", "feature FID", "licence",
    ):  # fmt: skip
        table.add_column(column)
    for name in kept.shipped():
        card = checkpoints.card(name)
        side, channels = card.settings.get("size", 32), card.settings.get("channels", 3)
        labels = card.settings.get("classes", 0)
        told = f", by {labels} labels" if labels else ""
        stopped = card.figures.get(STOPPED)
        until = "it drew strangers no better" if stopped else "a length given beforehand"
        ceiling, fid = (card.figures.get(figure) for figure in (CEILING, "feature_fid"))
        plain.row(
            table, name, f"{channels}x{side}x{side}{told}", f"{card.data}; {card.split}", until,
            "-" if ceiling is None else f"{ceiling:.1f}", "-" if fid is None else f"{fid:.2f}",
            card.license,
        )  # fmt: skip
    plain.console().print(table)


def _checkpoint(out: Path, name: str, images: ImageSet, recipe: Recipe) -> Path:
    """Where a training is kept while it runs: one file for these images and this recipe.

    Weights that saw other images never go on under this card, which tells what was seen.
    """
    told = f"{images.fingerprint()} {replace(recipe, steps=1)}"
    return out / f".{name}.{hashlib.sha256(told.encode()).hexdigest()[:12]}.training"


def _command(data: str, limit: int | None, name: str, recipe: Recipe) -> str:
    """What makes the prior again, but for the steps, which a budget may have made fewer."""
    from leakatlas.priors.stopping import PATIENCE

    words = ["leakatlas", "prior", "train", data, "--kind", recipe.kind]
    for option, value in (
        ("--size", recipe.size), ("--latent", None if recipe.kind == "ddpm" else recipe.latent),
        ("--width", recipe.width),
        ("--batch", recipe.batch), ("--limit", limit), ("--seed", recipe.seed), ("--name", name),
        ("--patience", None if recipe.patience == PATIENCE else recipe.patience),
    ):  # fmt: skip
        words += [] if value is None else [option, str(value)]
    words += ["--grey"] * recipe.grey + ["--conditional"] * recipe.conditional
    return shlex.join(words + ["--no-flips"] * (not recipe.flips))


def _show(card: Card, out: Path, planned: tuple[int, int] | None, asked: int) -> None:
    from leakatlas.priors.training import LOOK

    table = Table(title=f"Prior {card.name}", show_header=False)
    for what, text in (("data", card.data), ("split", card.split), ("recipe", card.recipe)):
        plain.row(table, what, text)
    looks = {n.removeprefix(LOOK): v for n, v in card.figures.items() if n.startswith(LOOK)}
    for figure, value in card.figures.items():
        if not figure.startswith(LOOK):
            plain.row(table, figure.replace("_", " "), f"{value:g}")
    if looks:
        told = ", ".join(f"{value:g} after {step}" for step, value in looks.items())
        plain.row(table, "inversion psnr db on the way", told)
    console = plain.console()
    console.print(table)
    if planned is not None:
        console.print(f"The budget made it {planned[0]:,} of {asked:,} steps.")
    console.print(f"Written to {escape(str(out))}; an attack takes it as prior: {escape(str(out))}")
