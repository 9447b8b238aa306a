"""Labelled images as people hold them, made into an :class:`ImageSet`: arrays, pictures, loaders.

What can mean one thing only is accepted, and the notes of the set say how it was understood; what
can mean two is refused with both readings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from leakatlas import limits, tensorfiles
from leakatlas.data import pictures
from leakatlas.data.box import Box
from leakatlas.data.images import ImageSet
from leakatlas.data.stacks import Arrays, Classes, named, numbered, renamed, stacked
from leakatlas.errors import InvalidInput, shown

Batch = ImageSet | tuple[Any, Any] | Mapping[str, Any] | Iterable[Any] | Sized
"""What :func:`as_images` reads; a Dataset has a length and items, a loader is iterable."""

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "targets", "y")

FORMS = (
    "expected an ImageSet, (images, labels), a mapping with both, a torch Dataset or a DataLoader; "
    "images may be tensors, numpy arrays or PIL pictures"
)

WHOLE_RANGE = {torch.uint8: 255, torch.uint16: 65535}
"""The highest pixel of types that have one."""

ROUNDING = 1e-3
"""How far normalised pixels may lie outside [0, 1] once the normalisation is undone."""


def as_images(
    given: Any,
    *,
    name: str = "batch",
    box: Box | None = None,
    vectors: bool = False,
    channels: Literal[1, 3] | None = None,
    classes: Classes | None = None,
) -> ImageSet:
    """What somebody holds, as an image set.

    Args:
        given: An :class:`ImageSet`; ``(images, labels)`` or a mapping with both; a torch Dataset,
            DataLoader or list of pairs, which is read to its end.
        name: For messages and reports.
        box: By which pixels outside [0, 1] may have been normalised already.
        vectors: Whether the loss takes one target per output, so that one-hot rows stay vectors.
        channels: 1 makes colour images grey, 3 gives grey ones three equal channels.
        classes: Names of the classes in the order of their labels, or label by name.

    Raises:
        InvalidInput: If it is none of these, could be read in two ways, or its labels go beyond
            the classes.
    """
    images = given if isinstance(given, ImageSet) else _read(given, name, box, vectors)
    if classes is not None:
        images = renamed(images, named(classes))
    return images if channels is None else images.with_channels(channels)


def _read(given: Any, name: str, box: Box | None, vectors: bool) -> ImageSet:
    notes: list[str] = []
    x, y = _pair(given, name, notes)
    images, labels = _numbers(x, f"{name}: images", notes), _targets(y, name)
    images = _channels_first(images, len(labels), isinstance(x, Tensor), name, notes)
    images = _unit(images, box, name, notes)
    labels, classes = _labels(labels, vectors, name, notes)
    return ImageSet(images, labels, classes, name, tuple(f"{name}: {note}" for note in notes))


# -- images and labels apart -----------------------------------------------------------------------


def _pair(given: Any, name: str, notes: list[str]) -> tuple[Any, Any]:
    if isinstance(given, str | bytes | Iterator):
        raise InvalidInput(f"{name}: got {type(given).__name__}; {FORMS}.")
    if isinstance(given, Mapping):
        keys = [next((k for k in known if k in given), None) for known in (IMAGE_KEYS, LABEL_KEYS)]
        if None in keys:
            raise InvalidInput(
                f"{name}: a mapping with the keys {shown(list(given))}; expected one of "
                f"{', '.join(IMAGE_KEYS)} and one of {', '.join(LABEL_KEYS)}."
            )
        return given[keys[0]], given[keys[1]]
    if isinstance(given, list) and given and all(_is_pair(one) for one in given):
        return _items(given, name)
    if isinstance(given, tuple | list):
        if len(given) == 2:
            return given[0], given[1]
        raise InvalidInput(f"{name}: {len(given)} parts, expected (images, labels); {FORMS}.")
    if isinstance(given, Tensor | np.ndarray | Image.Image):
        raise InvalidInput(f"{name}: images without labels; give (images, labels).")
    if hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        return _items((given[i] for i in range(len(given))), name)
    if isinstance(given, Iterable):
        return _batches(given, name, notes)
    raise InvalidInput(f"{name}: got {type(given).__name__}; {FORMS}.")


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple) and len(one) == 2


def _items(items: Iterable[Any], name: str) -> tuple[list[Any], list[Any]]:
    """The images and the labels of examples that come one by one."""
    xs: list[Any] = []
    ys: list[Any] = []
    for item in items:
        where = f"{name}, example {len(xs)}"
        if not isinstance(item, tuple | list | Mapping):
            raise InvalidInput(f"{where}: got {type(item).__name__}, expected (image, label).")
        x, y = _pair(item, where, [])
        if isinstance(x, Image.Image):
            values = 3 * x.width * x.height
        else:
            values = x.numel() if isinstance(x, Tensor) else np.size(x)
        limits.require_memory(
            name, 8 * (len(xs) + 1) * values, f"{len(xs) + 1} images of {values} values, twice"
        )
        xs.append(x)
        ys.append(y)
    return xs, ys


def _batches(loader: Iterable[Any], name: str, notes: list[str]) -> tuple[Tensor, Tensor]:
    """All batches of a loader, in the order that seed 0 gives it."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    held = 0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for batch in loader:
            where = f"{name}, batch {len(xs)}"
            x, y = _pair(batch, where, [])
            xs.append(_numbers(x, f"{where}: images", []))
            ys.append(_targets(y, where))
            held += xs[-1].numel()
            limits.require_memory(name, 8 * held, f"{held:,} values in float32, twice")
    if not xs:
        raise InvalidInput(f"{name}: the {type(loader).__name__} gives no batch.")
    notes.append(f"read to its end from a {type(loader).__name__}, in one order, that of seed 0")
    for what, parts in (("images", xs), ("labels", ys)):
        if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
            raise InvalidInput(f"{name}: the batches' {what} differ in shape or type.")
    return torch.cat(xs), torch.cat(ys)


# -- numbers ---------------------------------------------------------------------------------------


def _numbers(value: Any, who: str, notes: list[str]) -> Tensor:
    """Arrays, pictures, or a list of either, as one tensor; bytes and 16 bits are scaled."""
    if isinstance(value, Image.Image):
        value = [value]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if value and all(isinstance(one, Image.Image) for one in value):
            arrays = Arrays(who)
            for place, one in enumerate(value):
                arrays.append(pictures.pixels(one, f"{who}, picture {place}", None))
            images, more = stacked(arrays)
            notes.extend(more)
            return images
        parts = [_tensor(one, f"{who}, number {place}") for place, one in enumerate(value)]
        if len({part.shape for part in parts}) > 1:
            first = sorted({tuple(part.shape) for part in parts})[:3]
            raise InvalidInput(f"{who} of several shapes ({', '.join(map(str, first))}).")
        if not parts:
            raise InvalidInput(f"{who}: there are none.")
        tensor = torch.stack(parts)
    else:
        tensor = _tensor(value, who)
    full = WHOLE_RANGE.get(tensor.dtype)
    if full is None:
        return tensor
    notes.append(f"{str(tensor.dtype).removeprefix('torch.')} pixels were divided by {full}")
    return tensor.to(torch.float32) / full


def _tensor(value: Any, who: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().as_subclass(Tensor)
        if tensor.dtype != torch.uint16:
            tensorfiles.require_plain(who, tensor, who)
        return tensor.cpu()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "buif":
            raise TypeError(f"an array of {array.dtype}")
        # A copy in C order; ascontiguousarray would give a single number an axis.
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError) as problem:
        got = f"{type(value).__name__} ({str(problem)[:100]})"
        raise InvalidInput(f"{who}: expected numbers in an array; got {got}; {FORMS}.") from None


def _channels_first(x: Tensor, count: int, torchs: bool, name: str, notes: list[str]) -> Tensor:
    """``(N, C, H, W)``; the number of labels says what an axis that is missing would be."""
    shape = tuple(x.shape)
    if x.dim() == 2 and count == 1 and shape[0] > 1:
        notes.append(f"{shape} was taken as one grey image")
        return x[None, None]
    if x.dim() == 3:
        if shape[0] == count and (count > 1 or shape[0] not in (1, 3)):
            notes.append(f"{shape} was taken as {count} grey images")
            return x[:, None]
        first, last = shape[0] in (1, 3), shape[2] in (1, 3)
        if count == 1 and first != last:
            notes.append(f"{shape} was taken as one image, channels {'first' if first else 'last'}")
            return (x if first else x.permute(2, 0, 1))[None]
    if x.dim() != 4:
        raise InvalidInput(
            f"{name}: images have shape {shape} with {count} labels; expected (N, C, H, W) or "
            "(N, H, W, C), or (N, H, W) for grey images. Flattened images must be given their "
            "shape again: x.reshape(-1, C, H, W)."
        )
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first and last and not torchs and shape[1:] != (1, 1, 1):
        raise InvalidInput(
            f"{name}: images of shape {shape} may have their channels first or last; give a tensor "
            "(N, C, H, W)."
        )
    if not first and last:
        notes.append(f"{shape} was taken as channels last, (N, H, W, C)")
        return x.permute(0, 3, 1, 2)
    if not first and shape[3] in (2, 4) and shape[1] > 4:
        raise InvalidInput(
            f"{name}: images of shape {shape} seem to have {shape[3]} channels in the last place; "
            "drop the alpha channel (x[..., :3]), or give a tensor (N, C, H, W)."
        )
    return x


def _unit(x: Tensor, box: Box | None, name: str, notes: list[str]) -> Tensor:
    """Pixels in [0, 1]; what is left over is for :class:`ImageSet` to refuse."""
    whole = not x.is_floating_point() and x.dtype != torch.bool
    kind, x = str(x.dtype).removeprefix("torch."), x.to(torch.float32).contiguous()
    if not x.numel() or not bool(torch.isfinite(x).all()):
        return x
    low, high = float(x.min()), float(x.max())
    if whole and low >= 0 and high <= 1:
        raise InvalidInput(
            f"{name}: pixels are {kind} with no value above 1: bytes that are nearly black, or a "
            "binary image? Give uint8 for bytes, or floats in [0, 1]."
        )
    if whole and low >= 0 and high <= 65535:
        full = 255 if high <= 255 else 65535
        notes.append(f"{kind} pixels from {low:g} to {high:g} were divided by {full}")
        return x / full
    if low >= 0 and high <= 1:
        return x
    if 0 <= low and 1 < high <= 255 and bool((x == x.round()).all()):
        notes.append(f"{kind} pixels, all whole numbers up to {high:g}, were divided by 255")
        return x / 255
    if box is not None and box.channels == x.shape[1]:
        pixels = box.denormalize(x)
        if float(pixels.min()) >= -ROUNDING and float(pixels.max()) <= 1 + ROUNDING:
            notes.append(
                f"pixels from {low:.3g} to {high:.3g} were taken as normalised by the given mean "
                "and std, which was undone"
            )
            return pixels.clamp(0.0, 1.0)
    if low < 0 or high <= 255:
        raise InvalidInput(
            f"{name}: pixels must lie in [0, 1]; got {low:g} to {high:g}. Divide by 255 if they "
            "are bytes; undo the normalisation, or give the mean and std that were used "
            "(box=Box(mean, std); data.mean and data.std in YAML)."
        )
    return x


# -- labels ----------------------------------------------------------------------------------------


def _targets(y: Any, name: str) -> Tensor:
    who = f"{name}: labels"
    if y is None:
        raise InvalidInput(f"{who}: got None; give whole numbers 0, 1, 2, ...")
    if isinstance(y, Sequence) and not isinstance(y, str | bytes):
        if any(isinstance(one, str) for one in y):
            raise InvalidInput(
                f"{who} are names, such as {shown(y[0])}; which is 0, 1, 2, ... is for you to say."
            )
        if not y:
            return torch.zeros(0, dtype=torch.int64)
        parts = [_tensor(one, f"{who}, number {place}") for place, one in enumerate(y)]
        if len({part.shape for part in parts}) > 1:
            raise InvalidInput(f"{who} of several shapes.")
        return torch.stack(parts)
    found = _tensor(y, who)
    return found[None] if found.dim() == 0 else found


def _labels(
    y: Tensor, vectors: bool, name: str, notes: list[str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices ``(N,)``, or float targets ``(N, K)``; and the classes' names."""
    whole = not y.is_floating_point() or bool((y == y.round()).all())
    if y.dim() == 2 and y.shape[1] == 1 and not vectors and whole:
        notes.append(f"labels of shape {tuple(y.shape)} were taken as a column of classes")
        y = y[:, 0]
    if y.dim() == 1 and y.is_floating_point() and vectors:
        y = y[:, None]
    if y.dim() == 1:
        if not whole:
            raise InvalidInput(
                f"{name}: labels {shown(y[:3].tolist())} are no whole numbers; targets of a model "
                "with one output have shape (N, 1)."
            )
        if y.is_floating_point():
            notes.append("labels, whole numbers in floats, were taken as classes")
        y = y.to(torch.int64)
        return y, numbered(y.tolist(), name)
    if y.dim() != 2:
        raise InvalidInput(f"{name}: labels have shape {tuple(y.shape)}, expected (N,) or (N, K).")
    width = tuple(map(str, range(y.shape[1])))
    one_hot = bool(((y == 0) | (y == 1)).all()) and bool((y.sum(1) == 1).all())
    if one_hot and not vectors and len(y):
        notes.append(f"one-hot labels of {y.shape[1]} classes became their indices")
        return y.to(torch.float32).argmax(1), width
    return y.to(torch.float32), width
