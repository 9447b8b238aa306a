"""Encoded images: opened as one of a few formats, within limits, and never by another program.

Pillow guesses a format from the content, not from the name, and for some of its formats it starts
a program (EPS calls Ghostscript). Only the formats of :data:`FORMATS` are ever tried.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from leakatlas import limits, reading
from leakatlas.errors import InvalidInput, InvalidParameter

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# What Pillow's decoders raise on damaged content besides what reading can always meet.
_DAMAGED = (
    SyntaxError,  # Pillow's word for a broken PNG chunk
    Image.DecompressionBombError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    EOFError,
    AssertionError,
    struct.error,
    zlib.error,
)


Pixels = NDArray[np.uint8] | NDArray[np.uint16]
"""``(H, W)`` if grey and ``(H, W, 3)`` if not; grey pixels may have 16 bits."""


def decode(content: bytes, where: str, size: int | None) -> Pixels:
    """The first frame of an encoded image.

    Args:
        content: The file.
        where: For messages: its name, and the row if it is one of many.
        size: Side to which the centre square is resized; the image's own shape if None.

    Raises:
        InvalidInput: If it is no image of :data:`FORMATS`, is too large, or is damaged.
    """
    if len(content) > limits.PICTURE:
        raise InvalidInput(
            f"{where}: {limits.size(len(content))}; the limit for one image is "
            f"{limits.size(limits.PICTURE)}."
        )
    with _told(where, f"{len(content)} bytes"), _quiet():
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return pixels(image, where, size)


def pixels(image: Image.Image, where: str, size: int | None) -> Pixels:
    """As :func:`decode`, of an image that is open already."""
    if not isinstance(image, Image.Image):
        raise InvalidInput(f"{where}: expected an image; got {type(image).__name__}.")
    with _told(where, "an open image"), _quiet():
        if image.width * image.height > limits.PIXELS:
            raise InvalidInput(
                f"{where}: {image.width}x{image.height} pixels; the limit is {limits.PIXELS:,}."
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode[0] == "F":
            raise InvalidInput(
                f"{where}: pixels of floats have no fixed range; save the image with 8 or 16 bits."
            )
        if image.mode[0] == "I":
            return _sixteen_bits(image, where, size)
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        return np.asarray(_fitted(image, size), dtype=np.uint8)


def _sixteen_bits(image: Image.Image, where: str, size: int | None) -> NDArray[np.uint16]:
    """Grey pixels of more than 8 bits; Pillow holds them as whole numbers of 16 or 32."""
    image = image.convert("I")
    low, high = image.getextrema()
    assert isinstance(low, int | float) and isinstance(high, int | float)  # one band
    if low < 0 or high > 65535:
        raise InvalidInput(
            f"{where}: pixels from {low:g} to {high:g} have no fixed range; save the image with "
            "8 or 16 bits."
        )
    # Averages of pixels stay within their range.
    return np.asarray(_fitted(image.convert("F"), size)).round().astype(np.uint16)


def _fitted(image: Image.Image, size: int | None) -> Image.Image:
    if size is None:
        return image
    # Cropped before it is resized (ImageOps.fit is not): nothing outside bleeds in.
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((size, size), Image.Resampling.BILINEAR)


def require_side(size: int | None, who: str) -> None:
    """Refuse a side that no image has; None leaves every image its own.

    Raises:
        InvalidParameter: If ``size`` squared is beyond the limit on pixels.
    """
    if size is not None and (size < 1 or size * size > limits.PIXELS):
        raise InvalidParameter(
            f"{who}: expected a side from 1 to {int(limits.PIXELS**0.5):,} pixels; got {size}."
        )


@contextmanager
def only_known_formats() -> Iterator[None]:
    """Hold ``PIL.Image.open`` to :data:`FORMATS` while another library calls it."""
    original: Any = Image.open
    Image.open = functools.partial(original, formats=FORMATS)
    try:
        yield
    finally:
        Image.open = original


@contextmanager
def _quiet() -> Iterator[None]:
    # Pillow remarks on odd metadata and on large images; the pixels decide here.
    with warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def _told(where: str, got: str) -> Iterator[None]:
    try:
        with reading.boundary(where, *_DAMAGED, way_out="The image is damaged."):
            yield
    except InvalidInput as problem:
        if isinstance(problem.__cause__, UnidentifiedImageError):
            formats = ", ".join(FORMATS)
            raise InvalidInput(f"{where}: not an image ({got}); expected {formats}.") from None
        raise
