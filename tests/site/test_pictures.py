"""The small pictures of rows: what they carry, and what is no picture."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from leakatlas import metrics
from leakatlas.bench import picture
from leakatlas.errors import InvalidInput
from leakatlas.site import pictures


def saved(folder: Path, count: int = 8, channels: int = 3) -> pictures.Picture:
    originals = torch.rand(count, channels, 16, 12, generator=torch.Generator().manual_seed(0))
    public = torch.rand(4, channels, 16, 12)
    candidates = originals[: count - 1].flip(0) + 0.01
    scores = metrics.score(candidates, originals, public=public).images
    path = folder / "pictures" / "dlg.png"
    columns = picture.columns(originals, candidates, scores)
    assert len(columns) == min(count, picture.SHOWN)
    picture.save(path, columns, study="sweep", case="main")
    assert picture.study_of(path) == "sweep"
    found = pictures.of_row(folder, "dlg")
    assert found is not None
    return found


def test_six_victims_their_candidates_and_their_scores(tmp_path: Path) -> None:
    found = saved(tmp_path)
    assert (found.width, found.height) == (6 * 68 + 4, 2 * 68 + 4)
    assert found.said.study == "sweep" and len(found.said.psnr) == 6
    assert all(found.said.found) and min(found.said.psnr) > 35
    assert (tmp_path / found.name).stat().st_size < 100_000


def test_a_victim_without_a_candidate_stays_empty(tmp_path: Path) -> None:
    found = saved(tmp_path, count=2, channels=1)
    assert found.said.found == (True, False)
    with Image.open(tmp_path / found.name) as image:
        tile = image.convert("RGB").crop((72, 72, 136, 136))
        assert tile.getextrema() == ((128, 128),) * 3


def test_candidates_stand_below_their_own_victims(tmp_path: Path) -> None:
    found = saved(tmp_path)
    with Image.open(tmp_path / found.name) as image:
        pixels = torch.tensor(list(image.convert("RGB").tobytes())).view(140, 412, 3).double()
    for i in range(6):
        left = 4 + 68 * i
        above, below = pixels[4:68, left : left + 64], pixels[72:136, left : left + 64]
        assert float((above - below).abs().max()) <= 4  # 0.01 of 255, rounded


def test_a_row_without_a_picture_has_none(tmp_path: Path) -> None:
    assert pictures.of_row(tmp_path, "dlg") is None


@pytest.mark.parametrize("text", ["", "{}", "[", json.dumps({"study": "s", "psnr": []})])
def test_a_png_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("leakatlas", text)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "dlg.png", pnginfo=info)
    with pytest.raises(InvalidInput, match="no picture of a study"):
        pictures.of_row(tmp_path, "dlg")


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0", b"\x89PNG\r\n\x1a\nxx"])
def test_what_is_no_png_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dlg.png").write_bytes(content)
    with pytest.raises(InvalidInput, match="no picture of a study"):
        pictures.of_row(tmp_path, "dlg")


def test_a_giant_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("1", (5_000, 10)).save(tmp_path / "pictures" / "dlg.png")
    with pytest.raises(InvalidInput, match="5000 x 10 pixels"):
        pictures.of_row(tmp_path, "dlg")
