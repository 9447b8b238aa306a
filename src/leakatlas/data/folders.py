"""Image folders: one subfolder per class, and which label each class gets."""

from __future__ import annotations

import re
from pathlib import Path

from leakatlas import limits, reading
from leakatlas.data import pictures
from leakatlas.data.images import ImageSet
from leakatlas.data.stacks import Arrays, Classes, assemble, named, numbered
from leakatlas.errors import InvalidInput, shown


def image_folder(
    path: str | Path,
    size: int | None = None,
    *,
    limit: int | None = None,
    name: str | None = None,
    classes: Classes | None = None,
) -> ImageSet:
    """A folder with one subfolder per class, or with images only (then one class).

    Folders that are all called by whole numbers are these labels; others are numbered in sorted
    order (as torchvision does, which sorts whole numbers as text: name them in ``classes`` if the
    model was trained that way). The notes of the set say which class got which label.

    Args:
        path: The folder.
        size: As in :func:`leakatlas.data.parquet`.
        limit: Read only the first ``limit`` images, by class and then by name.
        name: Name of the set; the folder's if omitted.
        classes: Names of the subfolders in the order of their labels, or label by name.

    Raises:
        InvalidInput: If there is no such folder, no image in it, an image is unreadable, or a
            class has no label.
    """
    path = Path(path)
    pictures.require_side(size, str(path))
    with reading.boundary(f"The folder {shown(str(path))}"):
        files, names, note = _walk(path, limit, None if classes is None else named(classes))
    if not files:
        raise InvalidInput(
            f"{path}: no images; expected {path}/CLASS/IMAGE or {path}/IMAGE with one of "
            f"{', '.join(pictures.SUFFIXES)}."
        )
    arrays = Arrays(str(path))
    for file, _ in files:
        content = reading.read_bytes(file, what="image", limit=limits.PICTURE)
        arrays.append(pictures.decode(content, str(file), size))
    called = name or path.resolve().name
    return assemble(arrays, [label for _, label in files], names, called, (f"{called}: {note}",))


def _walk(
    path: Path, limit: int | None, given: tuple[str, ...] | None
) -> tuple[list[tuple[Path, int]], tuple[str, ...], str]:
    """Images with their labels, the name of every label, and both in words."""
    if not path.is_dir():
        raise InvalidInput(f"{path}: there is no such folder.")
    folders = sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))
    if folders:
        labels, names = _labels([folder.name for folder in folders], path, given)
        shown_first = ", ".join(
            f"{f.name} = {label}" for f, label in list(zip(folders, labels, strict=True))[:10]
        )
        more = f" and {len(folders) - 10} more" if len(folders) > 10 else ""
        note = f"class folders are the labels {shown_first}{more}"
    else:
        labels, names = [0], given or (path.resolve().name,)
        if len(names) > 1:
            raise InvalidInput(
                f"{path}: classes names {len(names)}, and the images lie in no folder of a class; "
                f"expected {path}/CLASS/IMAGE."
            )
        note = "there is no folder of a class, so every image has the label 0"
    files = [
        (file, label)
        for label, folder in sorted(zip(labels, folders or [path], strict=True))
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix.lower() in pictures.SUFFIXES
    ][:limit]
    return files, names, note


def _labels(
    folders: list[str], path: Path, given: tuple[str, ...] | None
) -> tuple[list[int], tuple[str, ...]]:
    if given is not None:
        if unnamed := [folder for folder in folders if folder not in given]:
            raise InvalidInput(
                f"{path}: the folder {shown(unnamed[0])} is no class; classes names "
                f"{shown(list(given))}. Add it, or move it out of {path}."
            )
        return [given.index(folder) for folder in folders], given
    if not all(re.fullmatch(r"[0-9]{1,10}", folder) for folder in folders):
        return list(range(len(folders))), tuple(folders)
    labels = [int(folder) for folder in folders]
    if len(set(labels)) < len(labels):
        raise InvalidInput(f"{path}: two class folders are the same whole number.")
    numbers = list(numbered(labels, str(path)))
    for folder, label in zip(folders, labels, strict=True):
        numbers[label] = folder
    return labels, tuple(numbers)
