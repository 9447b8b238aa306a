"""Pictures and data sets."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from leakatlas import data
from leakatlas.data import image_folder, parquet
from tests.doors.hostile import damaged
from tests.doors.registry import door, one


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    found = []
    for mode in ("RGB", "L", "RGBA", "P", "1", "LA", "I;16", "F", "CMYK", "YCbCr"):
        image = Image.new(mode, (9, 7))
        for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "DDS", "ICO"):
            buffer = io.BytesIO()
            try:
                image.save(buffer, form)
            except (OSError, ValueError, KeyError):
                continue  # a format that cannot hold the mode
            found.append(buffer.getvalue())
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    return (*found, eps)


@door(one("a.png", st.one_of(damaged(_pictures()), st.sampled_from(_pictures()))), share=3.0)
def image(folder: Path) -> object:
    """A folder of images."""
    return image_folder(folder, 8)


@functools.cache
def _parquets() -> tuple[bytes, ...]:
    png = _pictures()[0]
    found = []
    for cell in ({"bytes": png, "path": "x"}, {"bytes": png[:30], "path": None}, {"path": "/x"}):
        for labels in ([0, 1], [-1, 0], [2**40, 0], [None, 1]):
            table = pa.table({"img": [cell, cell], "label": pa.array(labels, type=pa.int64())})
            names = {"info": {"features": {"label": {"names": ["a", "b"]}}}}
            for extra in (None, json.dumps(names).encode(), b"[" * 5000, b"{"):
                held = (
                    table
                    if extra is None
                    else table.replace_schema_metadata({b"huggingface": extra})
                )
                buffer = io.BytesIO()
                pq.write_table(held, buffer)
                found.append(buffer.getvalue())
    return tuple(found)


@door(one("a.parquet", st.one_of(damaged(_parquets()), st.sampled_from(_parquets()))), share=2.0)
def parquet_file(folder: Path) -> object:
    """A Parquet file of images."""
    return parquet(folder / "a.parquet", 8)


KINDS = ("photos", "patches", "digits", "faces", "parquet", "folder", "torchvision", "", "x")
WORDS = (
    "8",
    "0",
    "-1",
    "²",
    "1e3",
    "99999999999999999999",
    "victim",
    "all",
    "x",
    ".",
    "/",
    "",
    "CIFAR10",
    "MNIST/train",
    "Food101",
    "@8",
    "@1000000000",
    "@²",
    "a\x00b",
    "[/x]",
)


@door(
    one(
        "spec",
        st.builds(
            lambda kind, words: ":".join([kind, *words]).encode("utf-8", "replace"),
            st.sampled_from(KINDS),
            st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), max_size=4),
        ),
    ),
    examples=100,
)
def data_name(folder: Path) -> object:
    """``data.victims: ...``"""
    return data.load((folder / "spec").read_text("utf-8"), limit=2)
