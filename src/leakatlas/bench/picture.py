"""The small picture of a run: six victims above, what came out below, with their scores.

The six are the first of the batch, not the best, and a victim without a candidate stays empty.
Scores travel in the PNG's own text, so that picture and figures cannot part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def draw(originals: Tensor, candidates: Tensor, scores: Sequence[ImageScore]) -> Image.Image:
    """Victims above, their candidates below, on grey.

    Args:
        originals: ``(N, C, H, W)`` in [0, 1], one or three channels.
        candidates: ``(M, C, H, W)``, in any order; clamped to [0, 1].
        scores: One an original; they name the candidates.
    """
    count = min(SHOWN, len(originals))
    pitch = TILE + GAP
    sheet = torch.full((3, 2 * pitch + GAP, count * pitch + GAP), 0.5)
    for i in range(count):
        tiles = [originals[i]]
        chosen = scores[i].candidate
        if chosen is not None:
            tiles.append(candidates[chosen])
        for row, image in enumerate(tiles):
            top, left = GAP + row * pitch, GAP + i * pitch
            sheet[:, top : top + TILE, left : left + TILE] = _tile(image)
    pixels = (sheet * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels)


def _tile(image: Tensor) -> Tensor:
    """``(3, TILE, TILE)``: small images by whole pixels, large ones by area."""
    image = image.detach().cpu().float().nan_to_num(0.5).clamp(0, 1)
    image = image.expand(3, -1, -1)[None]
    small = max(image.shape[-2:]) <= TILE
    return F.interpolate(image, (TILE, TILE), mode="nearest" if small else "area")[0]


def save(
    path: Path,
    originals: Tensor,
    candidates: Tensor,
    scores: Sequence[ImageScore],
    *,
    study: str,
    case: str,
) -> None:
    """Write the picture of a run as PNG, scores inside."""
    shown = scores[: min(SHOWN, len(originals))]
    text: dict[str, Any] = {
        "study": study,
        "case": case,
        "psnr": [round(score.psnr, 2) for score in shown],
        "ssim": [None if score.ssim is None else round(score.ssim, 3) for score in shown],
        "found": [score.candidate is not None for score in shown],
    }
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT, json.dumps(text, allow_nan=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(originals, candidates, scores).save(path, format="PNG", optimize=True, pnginfo=info)
