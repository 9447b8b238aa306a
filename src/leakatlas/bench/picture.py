"""The small picture of a study: six victims above, what came out of each below, with scores.

The six are the first of the first case, not the best, and a victim without a candidate stays
empty. Every cell keeps a column for each of its first victims; the columns of several cells make
one picture. Scores travel in the PNG's own text, so that picture and figures cannot part.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from leakatlas.metrics.score import ImageScore

SHOWN = 6
TILE, GAP = 64, 4
TEXT = "leakatlas"
"""Name of the PNG's text chunk: ``{"study", "case", "psnr", "ssim", "found"}`` as JSON."""


@dataclass(frozen=True)
class Column:
    """A victim above its candidate.

    Args:
        png: The two tiles, in base64.
        psnr: In dB.
        ssim: None where undefined.
        found: Whether there is a candidate.
    """

    png: str
    psnr: float
    ssim: float | None
    found: bool


def columns(
    originals: Tensor, candidates: Tensor, scores: Sequence[ImageScore]
) -> tuple[Column, ...]:
    """The columns of the first victims of a batch.

    Args:
        originals: ``(N, C, H, W)`` in [0, 1], one or three channels.
        candidates: ``(M, C, H, W)`` in any order; clamped to [0, 1].
        scores: One an original; they name the candidates.
    """
    found = []
    for original, score in zip(originals[:SHOWN], scores, strict=False):
        tiles = [_tile(original)]
        tiles.append(
            torch.full_like(tiles[0], 0.5)
            if score.candidate is None
            else _tile(candidates[score.candidate])
        )
        column = torch.cat([tiles[0], torch.full((3, GAP, TILE), 0.5), tiles[1]], dim=1)
        pixels = (column * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
        found.append(
            Column(
                png=base64.b64encode(buffer.getvalue()).decode(),
                psnr=score.psnr,
                ssim=score.ssim,
                found=score.candidate is not None,
            )
        )
    return tuple(found)


def _tile(image: Tensor) -> Tensor:
    """``(3, TILE, TILE)``: small images by whole pixels, large ones by area."""
    image = image.detach().cpu().float().nan_to_num(0.5).clamp(0, 1)
    image = image.expand(3, -1, -1)[None]
    small = max(image.shape[-2:]) <= TILE
    return F.interpolate(image, (TILE, TILE), mode="nearest" if small else "area")[0]


def save(path: Path, shown: Sequence[Column], *, study: str, case: str) -> None:
    """Write columns side by side as one PNG, scores inside."""
    shown = shown[:SHOWN]
    sheet = Image.new(
        "RGB", (len(shown) * (TILE + GAP) + GAP, 2 * (TILE + GAP) + GAP), (128, 128, 128)
    )
    for number, column in enumerate(shown):
        with Image.open(io.BytesIO(base64.b64decode(column.png)), formats=["PNG"]) as tiles:
            sheet.paste(tiles.convert("RGB"), (GAP + number * (TILE + GAP), GAP))
    text: dict[str, Any] = {
        "study": study,
        "case": case,
        "psnr": [round(column.psnr, 2) for column in shown],
        "ssim": [None if column.ssim is None else round(column.ssim, 3) for column in shown],
        "found": [column.found for column in shown],
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT, json.dumps(text, allow_nan=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True, pnginfo=info)


def study_of(path: Path) -> str:
    """The study that left a picture; empty where there is none that can be read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = json.loads(getattr(image, "text", {}).get(TEXT, "{}"))
    except (OSError, ValueError, SyntaxError):  # SyntaxError is Pillow's broken PNG
        return ""
    return str(text.get("study", "")) if isinstance(text, dict) else ""
