"""Decoded pictures, put together into one set with labels and class names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from leakatlas import limits
from leakatlas.data.images import ImageSet
from leakatlas.data.pictures import Pixels
from leakatlas.errors import InvalidInput, shown

Classes = Sequence[str | int] | Mapping[str, int]
"""Names of classes in the order of their labels, or the label of each name."""

MAX_CLASSES = 100_000
"""ImageNet-21k has 21,843; one stray label must not allocate a name each."""


class Arrays(list[Pixels]):
    """Decoded images; refuses the one with which they no longer fit into memory as floats."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who
        self.needed = 0

    def append(self, array: Pixels) -> None:
        """Add one image.

        Raises:
            InvalidParameter: If this machine's memory would not hold them all.
        """
        super().append(array)
        self.needed += array.nbytes + 4 * array.size
        arithmetic = f"{len(self)} images, the last {array.shape}, in float32 and as they came"
        limits.require_memory(self.who, self.needed, arithmetic)


def assemble(
    arrays: Arrays,
    labels: Iterable[int],
    classes: tuple[str, ...],
    name: str,
    notes: tuple[str, ...] = (),
) -> ImageSet:
    """One set of all images, in [0, 1]; grey ones get three channels beside colour ones.

    Raises:
        InvalidInput: If there is none, or they differ in size.
    """
    images, more = stacked(arrays)
    return ImageSet(
        images,
        torch.tensor(list(labels), dtype=torch.int64),
        classes,
        name,
        (*notes, *(f"{name}: {note}" for note in more)),
    )


def stacked(arrays: Arrays) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Pixels ``(N, C, H, W)`` in [0, 1], and what was done to them.

    Raises:
        InvalidInput: If there is none, or they differ in size.
    """
    if not arrays:
        raise InvalidInput(f"{arrays.who}: there are no images in it.")
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) > 1:
        some = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
        raise InvalidInput(
            f"{arrays.who}: images of several sizes ({some}); say which with size= (in YAML "
            "PATH@SIZE)."
        )
    colour = [array.ndim == 3 for array in arrays]
    deep = [array.dtype == np.uint16 for array in arrays]
    images = torch.empty(len(arrays), 3 if any(colour) else 1, *arrays[0].shape[:2])
    for place, array in enumerate(arrays):
        full = 65535.0 if array.dtype == np.uint16 else 255.0
        one = torch.from_numpy(array.astype(np.float32)).div_(full)
        images[place] = one.permute(2, 0, 1) if array.ndim == 3 else one
    notes = []
    if any(deep):
        highest = max(int(a.max()) for a, d in zip(arrays, deep, strict=True) if d)
        notes.append(f"{sum(deep)} images of 16 bits were divided by 65535 (highest: {highest})")
    if any(colour) and not all(colour):
        grey = len(colour) - sum(colour)
        notes.append(f"{grey} grey images among colour ones became 3 equal channels")
    return images, tuple(notes)


def numbered(labels: Sequence[int], where: str) -> tuple[str, ...]:
    """Class names for labels that came without: their numbers.

    Raises:
        InvalidInput: If there would be more than :data:`MAX_CLASSES`.
    """
    highest = max(labels, default=0)
    if highest >= MAX_CLASSES:
        raise InvalidInput(
            f"{where}: label {highest} without class names; at most {MAX_CLASSES:,} are numbered."
        )
    return tuple(map(str, range(max(highest, 0) + 1)))


def named(classes: Classes) -> tuple[str, ...]:
    """The name of every label; the number of one that has no name.

    >>> named({"NORMAL": 0, "PNEUMONIA": 2})
    ('NORMAL', '1', 'PNEUMONIA')

    Raises:
        InvalidInput: If there is no name, one comes twice, or two names have one label.
    """
    if not isinstance(classes, Mapping):
        classes = {str(name): label for label, name in _once(classes)}
    if not classes:
        raise InvalidInput("classes: expected at least one name.")
    by_label = {label: name for name, label in classes.items()}
    if len(by_label) < len(classes):
        raise InvalidInput(f"classes: two names have one label in {shown(dict(classes))}.")
    if min(by_label) < 0:
        raise InvalidInput(f"classes: labels are 0, 1, 2, ...; got {min(by_label)}.")
    numbers = numbered(list(by_label), "classes")
    return tuple(by_label.get(label, number) for label, number in enumerate(numbers))


def renamed(images: ImageSet, names: tuple[str, ...]) -> ImageSet:
    """The same images with other names of their classes.

    Raises:
        InvalidInput: If the labels go beyond them.
    """
    if images.classes == names or images.labels.ndim == 2:
        return replace(images, classes=names)
    highest = int(images.labels.max())
    if highest >= len(names):
        raise InvalidInput(
            f"{images.name}: classes names {len(names)}; the labels go up to {highest}."
        )
    return replace(images, classes=names)


def _once(names: Sequence[str | int]) -> list[tuple[int, str | int]]:
    if doubled := [name for name in names if names.count(name) > 1]:
        raise InvalidInput(f"classes: {shown(doubled[0])} comes twice.")
    return list(enumerate(names))
