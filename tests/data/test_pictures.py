from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from leakatlas import limits
from leakatlas.data import image_folder, load, pictures, torchvision_set
from leakatlas.errors import InvalidInput, InvalidParameter

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(owned) print\n%%EOF\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What Pillow would have given to Ghostscript."""
    calls: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: calls.append(a))
    return calls


def encoded(form: str, **options: Any) -> bytes:
    frame = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    other = Image.new("RGB", (4, 4), (255, 0, 0))
    buffer = io.BytesIO()
    if form == "GIF":
        options |= {"save_all": True, "append_images": [other]}
    frame.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", pictures.FORMATS)
def test_the_listed_formats_open_and_animations_by_their_first_frame(form: str) -> None:
    pixels = pictures.decode(encoded(form), "x", None)
    expected = np.arange(48).reshape(4, 4, 3)
    tolerance = 0 if form in ("PNG", "BMP", "TIFF", "PPM") else 12  # the rest are lossy
    assert pixels.shape == (4, 4, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("form", ["DDS", "ICNS", "TGA", "SGI", "PCX"])
def test_other_formats_are_refused_by_name(form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    with pytest.raises(InvalidInput, match=r"^a\.png: not an image .*expected PNG, JPEG"):
        pictures.decode(buffer.getvalue(), "a.png", None)


def test_an_image_never_starts_a_program(tmp_path: Path, started: list[object]) -> None:
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(InvalidInput, match=r"a\.png: not an image"):
        image_folder(tmp_path)
    with Image.open(tmp_path / "a.png") as image:  # the trap works: Pillow alone would start it
        with pytest.raises((AttributeError, AssertionError)):  # it gave no pixels
            image.load()
    assert len(started) == 1


def test_neither_does_one_that_torchvision_opens(tmp_path: Path, started: list[object]) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    for name in ("images", "annotations/trimaps"):
        (folder / name).mkdir(parents=True)
    (folder / "annotations" / "test.txt").write_text("Abyssinian_1 1 1 1\n")
    (folder / "images" / "Abyssinian_1.jpg").write_bytes(EPS)
    (folder / "annotations" / "trimaps" / "Abyssinian_1.png").write_bytes(encoded("PNG"))
    with pytest.raises(InvalidInput, match="OxfordIIITPet test, image 0"):
        torchvision_set("OxfordIIITPet", tmp_path)
    assert not started
    (folder / "images" / "Abyssinian_1.jpg").write_bytes(encoded("PNG"))
    assert torchvision_set("OxfordIIITPet", tmp_path).images.shape == (1, 3, 4, 4)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", b"") + _chunk(b"IEND", b"")
    with pytest.raises(InvalidInput, match=r"10000x10000 pixels; the limit is 64,000,000"):
        pictures.decode(b"\x89PNG\r\n\x1a\n" + chunks, "b.png", None)


def test_a_file_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PICTURE", 50)
    with pytest.raises(InvalidInput, match="the limit for one image is 50 bytes"):
        pictures.decode(encoded("PNG"), "b.png", None)


@pytest.mark.parametrize("form", pictures.FORMATS)
def test_every_truncation_is_an_image_or_a_message(form: str) -> None:
    content = encoded(form)
    for length in range(0, len(content), 3):
        try:
            assert pictures.decode(content[:length], "cut", None).dtype == np.uint8
        except InvalidInput as problem:
            assert str(problem).startswith("cut")


def test_a_set_that_outgrows_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(limits, "memory", lambda: 600)  # two images of 48 values fit
    assert len(image_folder(tmp_path, limit=2)) == 2
    with pytest.raises(InvalidParameter, match="3 images"):
        image_folder(tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        "folder:.@1000000000", "folder:.@0", "folder:.@99999999999999999999", "photos:²",
        "photos:100000", "patches:4096:10000000", "digits:8000", "faces:٣", "photos:-1", "photos:",
        "photos:32:32", "patches:32:0", "photos:" + "9" * 5000,
    ],
)  # fmt: skip
def test_sizes_that_no_image_has_are_refused(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    if spec == "photos:":
        assert load(spec).images.shape == (8, 3, 32, 32)
    else:
        with pytest.raises(InvalidParameter):
            load(spec)
