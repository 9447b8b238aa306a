"""What a ``prior.yaml`` may say, and the prior that it describes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from leakatlas import reading, yamlfiles
from leakatlas.errors import InvalidInput, shown
from leakatlas.models import Card
from leakatlas.models.checkpoints import read_state
from leakatlas.priors.foreign.biggan import BigGANRecipe
from leakatlas.priors.foreign.diffusers import AutoencoderRecipe, UNetRecipe
from leakatlas.priors.foreign.kind import Kind
from leakatlas.priors.foreign.layers import LayersRecipe
from leakatlas.priors.foreign.stylegan2 import StyleGAN2Recipe
from leakatlas.priors.prior import Diffusion, Prior

RECIPE = "prior.yaml"

Recipe = Annotated[
    BigGANRecipe | StyleGAN2Recipe | UNetRecipe | AutoencoderRecipe | LayersRecipe,
    Field(discriminator="kind"),
]
_READER: TypeAdapter[Kind] = TypeAdapter(Recipe)


def describes(path: Path) -> bool:
    """Whether a folder, or a file, is a prior of others."""
    return path.name == RECIPE or reading.is_file(path / RECIPE)


def load(path: Path) -> Prior | Diffusion:
    """The prior that a ``prior.yaml``, or the folder of one, describes; frozen, in eval mode.

    Raises:
        InvalidInput: If the recipe cannot be read, or weights and recipe do not belong together.
        Unavailable: If the package of the architecture is not installed.
    """
    file = path if path.name == RECIPE else path / RECIPE
    recipe = _read(file)
    folder = file.parent
    weights = folder / recipe.weights
    read = read_state(weights)
    state = {n: t.float() if t.is_floating_point() else t for n, t in read.state.items()}
    figures = {} if recipe.inversion_psnr is None else {recipe.ceiling: recipe.inversion_psnr}
    card = Card(
        name=folder.resolve().name, model=recipe.kind, settings={}, box=None, data=recipe.data,
        split=recipe.split, recipe=RECIPE, seed=0, epochs=0, figures=figures, date="",
        license=recipe.license, sha256=_digest(weights),
    )  # fmt: skip
    who = f"The prior {shown(str(folder))}"
    return recipe.build(card, folder, state, who)


def _read(file: Path) -> Kind:
    values = yamlfiles.read(file, what="recipe of a prior")
    try:
        return _READER.validate_python(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidInput(
            f"{shown(str(file))}: not the recipe of a prior: {where}: {first['msg']}."
        ) from None


def _digest(file: Path) -> str:
    with reading.boundary(f"The weights {shown(str(file))}"), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
