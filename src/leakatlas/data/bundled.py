"""Real images that come inside the wheels of scikit-image and scikit-learn: nothing is downloaded.

scikit-image's ``skimage.data`` also names images that it would fetch; none of those is used here.
In the wheels (scikit-image 0.24 and later, scikit-learn 1.4 and later) there are:

- colour photos: astronaut, cat, coffee, rocket, retina, histology (immunohistochemistry), the
  Hubble deep field, the left view of a stereo pair of a motorcycle, and scikit-learn's china and
  flower;
- grey photos: camera, moon, coins, brick, grass, gravel (used as surrogate patches, each as three
  equal channels);
- the LFW subset: 200 grey crops of 25x25, of which the first 100 are faces and the last 100 are
  *not* (they are background crops); there are no identities in it;
- scikit-learn's digits: 1,797 grey images of 8x8.

That is few: 8 victim photos, and no second photo of any victim. Where an attack needs a surrogate
distribution, a data set on disk (see :mod:`leakatlas.data.loaders`) is the better choice. Victim
and surrogate are split *by photo*: no pixel of a victim photo is in the surrogate part.

The colour photos are in the public domain or CC0 (scikit-image's README lists each), but china
(danielbuechele) and flower (vultilion), which are CC BY 2.0.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas import limits
from leakatlas.data import pictures
from leakatlas.data.images import ImageSet
from leakatlas.errors import InvalidParameter, UnknownName, needing

STRANGERS = 256
"""How many public images an audit has without a surrogate of the user's."""

CONTRAST = 0.1
"""Standard deviation of its pixels below which a crop is left out: flat sky tests no attack."""

DIGITS = "datasets/data/digits.csv.gz"

PARTS = ("victim", "surrogate", "all")


@dataclass(frozen=True)
class _Photo:
    """A photo, its part, and the square (top, left, side) that shows its subject."""

    package: str
    file: str
    part: str
    square: tuple[int, int, int]


_INSTALLED_AS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def _file(who: str, package: str, name: str) -> Path:
    """A data file of an installed package, which is not imported: that takes seconds.

    Raises:
        Unavailable: If the package is not installed; ``who`` needs it.
    """
    spec = importlib.util.find_spec(package)
    origin = None if spec is None else spec.origin
    with needing(who, _INSTALLED_AS[package]):
        if origin is None:
            raise ModuleNotFoundError(name=package)
    assert origin is not None
    return Path(origin).parent / name


_PHOTOS: dict[str, _Photo] = {
    "astronaut": _Photo("skimage", "data/astronaut.png", "victim", (0, 90, 270)),
    "cat": _Photo("skimage", "data/chelsea.png", "victim", (0, 75, 300)),
    "coffee": _Photo("skimage", "data/coffee.png", "victim", (0, 130, 400)),
    "rocket": _Photo("skimage", "data/rocket.jpg", "victim", (0, 106, 427)),
    "retina": _Photo("skimage", "data/retina.jpg", "victim", (0, 0, 1411)),
    "histology": _Photo("skimage", "data/ihc.png", "victim", (0, 0, 512)),
    "flower": _Photo("sklearn", "datasets/images/flower.jpg", "victim", (0, 106, 427)),
    "motorcycle": _Photo("skimage", "data/motorcycle_left.png", "victim", (0, 120, 500)),
    "china": _Photo("sklearn", "datasets/images/china.jpg", "surrogate", (0, 106, 427)),
    "galaxies": _Photo("skimage", "data/hubble_deep_field.jpg", "surrogate", (0, 64, 872)),
    "camera": _Photo("skimage", "data/camera.png", "surrogate", (0, 0, 512)),
    "moon": _Photo("skimage", "data/moon.png", "surrogate", (0, 0, 512)),
    "coins": _Photo("skimage", "data/coins.png", "surrogate", (0, 40, 303)),
    "brick": _Photo("skimage", "data/brick.png", "surrogate", (0, 0, 512)),
    "grass": _Photo("skimage", "data/grass.png", "surrogate", (0, 0, 512)),
    "gravel": _Photo("skimage", "data/gravel.png", "surrogate", (0, 0, 512)),
}


def photos(size: int = 32, *, part: str = "victim") -> ImageSet:
    """One image per bundled photo: the square that shows its subject, as ``(N, 3, size, size)``.

    Every photo is a class of its own.

    Args:
        size: Side of the images; 32 and 64 are the usual ones.
        part: "victim" (8 photos), "surrogate" (8 others, 6 of them grey) or "all".
    """
    chosen = _part(part)
    _require_room("photos", len(chosen), 3, size)
    images = torch.cat([_crop(_read(name), _PHOTOS[name].square, size) for name in chosen])
    return ImageSet(images, torch.arange(len(chosen)), chosen, f"photos-{size}-{part}")


def patches(size: int = 32, n: int = 256, *, part: str = "victim") -> ImageSet:
    """``n`` square crops of the bundled photos, as ``(n, 3, size, size)``; the class is the photo.

    Nothing is random: crop i of a photo has the scale and place of the i-th Halton point, so
    ``patches(size, n)`` begins ``patches(size, n + 1)``. Sides run from the whole photo down to a
    quarter of it, but never below ``size`` pixels where the photo has as many.

    Args:
        size: Side of the images.
        n: How many.
        part: As in :func:`photos`.
    """
    if n < 1:
        raise InvalidParameter(f"patches(n={n}): expected a positive number.")
    chosen = _part(part)
    _require_room("patches", n, 3, size)
    labels = torch.arange(n) % len(chosen)
    images = torch.empty(n, 3, size, size)
    for index, name in enumerate(chosen):
        places = torch.nonzero(labels == index).flatten().tolist()
        photo = _read(name)
        for i, place in enumerate(places):
            images[place] = _crop(photo, _halton_square(photo, i + 1, size), size)[0]
    return ImageSet(images, labels, chosen, f"patches-{size}-{n}-{part}")


def strangers(victims: ImageSet, n: int = STRANGERS) -> ImageSet:
    """Public images that everybody has, for whoever has none of the victims' population.

    Crops of the bundled photos in the victims' shape, as ``(M, C, H, W)`` with M at most ``n``:
    flat ones (sky) are left out, and so is every victim. Where the victims are bundled photos
    themselves, crops come from the photos of the other part, which share no pixel with them. One
    channel, or any number but three, is filled with their grey mean.

    Args:
        victims: Of whose pixels only equality is asked.
        n: How many crops are looked at.
    """
    private = {image.numpy().tobytes() for image in victims.images}
    bundled = victims.name.startswith(("photos-", "patches-"))
    if not bundled and victims.channels == 3:  # under another name
        own = photos(max(victims.shape[1:])).images
        bundled = any(image.numpy().tobytes() in private for image in own)
    found = _lively(victims.shape, n, "surrogate" if bundled else "all")
    kept = [i for i, x in enumerate(found.images) if x.numpy().tobytes() not in private]
    return found if len(kept) == len(found) else found.subset(kept)


@functools.lru_cache(maxsize=8)
def _lively(shape: tuple[int, int, int], n: int, part: str) -> ImageSet:
    channels, height, width = shape
    held = patches(max(height, width), n, part=part)
    images = held.images[:, :, :height, :width]
    if channels != 3:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    lively = images.flatten(1).std(1) > CONTRAST
    if int(lively.sum()) < n // 4:
        lively = torch.ones_like(lively)
    name = f"strangers-{channels}x{height}x{width}"
    return ImageSet(images[lively].contiguous(), held.labels[lively], held.classes, name)


def faces(size: int = 25) -> ImageSet:
    """scikit-image's LFW subset: 100 grey face crops and 100 background crops, ``(200, 1, ., .)``.

    Args:
        size: Side; 25 is the side of the files.
    """
    _require_room("faces", 200, 1, size)
    crops = torch.from_numpy(
        np.load(_file("the set of faces", "skimage", "data/lfw_subset.npy")).astype(np.float32)
    )
    labels = torch.arange(200) // 100
    classes = ("face", "background")
    return ImageSet(crops[:, None].clamp(0, 1), labels, classes, f"faces-{size}").resize(size)


def digits(size: int = 8) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, ``(1797, 1, size, size)``.

    Args:
        size: Side; 8 is the side of the files.
    """
    _require_room("digits", 1797, 1, size)
    with gzip.open(_file("the set of digits", "sklearn", DIGITS), "rt") as rows:
        table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.float32))
    images = table[:, :-1].reshape(-1, 1, 8, 8) / 16.0
    labels = table[:, -1].to(torch.int64)
    return ImageSet(images, labels, tuple("0123456789"), f"digits-{size}").resize(size)


def _require_room(name: str, count: int, channels: int, size: int) -> None:
    pictures.require_side(size, f"{name}(size={size})")
    arithmetic = f"{count:,} images x {channels} channels x {size:,}^2 pixels x 4 bytes, twice"
    # Twice: the pictures before and after they are put together.
    limits.require_memory(f"{name}(size={size})", 8.0 * count * channels * size**2, arithmetic)


def _part(part: str) -> tuple[str, ...]:
    if part not in PARTS:
        raise UnknownName("part of the bundled photos", part, PARTS)
    return tuple(name for name, photo in _PHOTOS.items() if part in (photo.part, "all"))


def _read(name: str) -> Tensor:
    """A photo as ``(1, 3, H, W)`` in [0, 1]."""
    photo = _PHOTOS[name]
    who = f"the bundled picture {Path(photo.file).name!r}"
    file = _file(who, photo.package, photo.file)
    pixels = torch.from_numpy(np.array(pictures.decode(file.read_bytes(), str(file), None)))
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    return pixels[..., :3].permute(2, 0, 1)[None].to(torch.float32) / 255.0


def _crop(photo: Tensor, square: tuple[int, int, int], size: int) -> Tensor:
    top, left, side = square
    region = photo[:, :, top : top + side, left : left + side]
    return F.interpolate(
        region, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)


def _halton_square(photo: Tensor, i: int, size: int) -> tuple[int, int, int]:
    height, width = photo.shape[2:]
    short = min(height, width)
    side = max(round(short * 4.0 ** -_radical_inverse(i, 2)), min(size, short))
    top = round(_radical_inverse(i, 3) * (height - side))
    left = round(_radical_inverse(i, 5) * (width - side))
    return top, left, side


def _radical_inverse(i: int, base: int) -> float:
    """Coordinate i of the van der Corput sequence: the digits of i mirrored at the point."""
    value, weight = 0.0, 1.0 / base
    while i:
        i, digit = divmod(i, base)
        value += digit * weight
        weight /= base
    return value
