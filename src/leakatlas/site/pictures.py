"""The small pictures that studies leave in ``results/pictures/``: victims and what came out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from leakatlas.errors import InvalidInput

FOLDER = "pictures"
LARGEST = 2_000
"""Pixels a side; what studies draw has a few hundred."""


class _Said(BaseModel):
    """The text that a picture carries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    case: str
    psnr: Annotated[tuple[float, ...], Field(min_length=1, max_length=6)]
    ssim: tuple[float | None, ...]
    found: tuple[bool, ...]


@dataclass(frozen=True)
class Picture:
    """A picture of a row.

    Args:
        name: Its place in the site.
        width: In pixels.
        height: In pixels.
        said: Study, case, and one PSNR, SSIM and flag for every victim shown.
    """

    name: str
    width: int
    height: int
    said: _Said


def of_row(results_folder: Path, key: str) -> Picture | None:
    """The picture of an attack, if a study left one.

    Raises:
        InvalidInput: If the file is no such picture.
    """
    path = results_folder / FOLDER / f"{key}.png"
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            width, height = image.size
            if max(width, height) > LARGEST:
                raise ValueError(f"{width} x {height} pixels are no small picture")
            image.load()
            text = getattr(image, "text", {}).get("leakatlas", "")
            said = _Said.model_validate(json.loads(text))
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError is Pillow's broken PNG
        raise InvalidInput(
            f"{path} is no picture of a study: {str(error).splitlines()[0]}. Expected what "
            "`leakatlas bench` writes; delete it, or run the study again."
        ) from None
    return Picture(f"{FOLDER}/{path.name}", width, height, said)


def copy(picture: Picture, results_folder: Path, out: Path) -> None:
    """Put a picture into the site."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(results_folder / picture.name, out / picture.name)
