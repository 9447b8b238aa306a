"""Data sets from disk: Parquet in the Hugging Face image layout, image folders, torchvision.

Files are data: nothing in them is executed, a path inside a Parquet file is never opened, and a
truncated, oversized or foreign file is refused with its name and row.
"""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leakatlas import reading
from leakatlas.data import bundled, pictures
from leakatlas.data.folders import image_folder
from leakatlas.data.images import ImageSet
from leakatlas.data.stacks import Arrays, Classes, assemble, named, numbered, renamed
from leakatlas.errors import (
    InvalidInput,
    InvalidParameter,
    Unavailable,
    UnknownName,
    needing,
    shown,
)

if TYPE_CHECKING:
    import pyarrow.parquet as pq

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
MAX_LABEL = 2**31

# What pyarrow raises besides what reading can always meet, and its own ArrowException.
_ARROW = (LookupError, TypeError, NotImplementedError, RuntimeError)

# What torchvision's readers raise on damaged files.
_FOREIGN = (LookupError, TypeError, AttributeError, AssertionError, EOFError, struct.error)

# How torchvision's constructor of each set names its parts: a flag, or a word.
_BY_FLAG = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS")
_BY_WORD = ("SVHN", "STL10", "GTSRB", "Food101", "Flowers102", "DTD", "OxfordIIITPet", "PCAM")
TORCHVISION = tuple(sorted((*_BY_FLAG, *_BY_WORD)))


def parquet(
    path: str | Path, size: int | None = None, *, limit: int | None = None, name: str | None = None
) -> ImageSet:
    """A Parquet file in the Hugging Face layout: ``img`` or ``image`` = {bytes, path}, ``label``.

    Args:
        path: The file.
        size: Side to which every image is cropped (centre square) and resized; may be omitted
            when all images already have one shape.
        limit: Read only the first ``limit`` rows.
        name: Name of the set; the file's stem if omitted.

    Raises:
        InvalidInput: If the file or one of its images cannot be read; the message names the row.
    """
    path = Path(path)
    pictures.require_side(size, str(path))
    file = _open_parquet(path)
    columns = file.schema_arrow.names
    image_column = next((column for column in IMAGE_COLUMNS if column in columns), None)
    label_column = next((column for column in LABEL_COLUMNS if column in columns), None)
    if image_column is None or label_column is None:
        raise InvalidInput(
            f"{path}: expected an image column ({' or '.join(IMAGE_COLUMNS)}) and a label column "
            f"({', '.join(LABEL_COLUMNS)}); the file has {', '.join(columns) or 'no columns'}."
        )
    import pyarrow as pa

    if not pa.types.is_integer(file.schema_arrow.field(label_column).type):
        raise InvalidInput(
            f"{path}: {label_column} must hold integers; it holds "
            f"{file.schema_arrow.field(label_column).type}."
        )
    arrays = Arrays(str(path))
    labels: list[int] = []
    for image, label in _rows(file, path, image_column, label_column, limit):
        where = f"{path}, row {len(labels)}"
        arrays.append(pictures.decode(_cell_bytes(image, where), where, size))
        if label is None or not 0 <= label < MAX_LABEL:
            raise InvalidInput(f"{where}: the label is {shown(label)}, expected 0, 1, 2, ...")
        labels.append(label)
    names = _class_names(file.schema_arrow.metadata, label_column)
    classes = names or numbered(labels, str(path))
    return assemble(arrays, labels, classes, name or path.stem)


def torchvision_set(
    name: str,
    root: str | Path,
    split: str = "test",
    *,
    size: int | None = None,
    limit: int | None = None,
    download: bool = False,
) -> ImageSet:
    """A torchvision classification set that lies under ``root``.

    Args:
        name: A name of :data:`TORCHVISION`, such as "CIFAR10".
        root: The folder torchvision was given.
        split: "train" or "test" (and what else the set has, such as "val").
        size: As in :func:`parquet`.
        limit: Read only the first ``limit`` images.
        download: Whether torchvision may fetch the files.

    Raises:
        UnknownName: If the set is not supported.
        InvalidParameter: If the set has no such split.
        Unavailable: If the files are not there; the message has the command that fetches them.
    """
    if name not in TORCHVISION:
        raise UnknownName("torchvision data set", name, TORCHVISION)
    pictures.require_side(size, name)
    arguments: dict[str, Any] = {"root": str(root), "download": download}
    if name in _BY_FLAG:
        if split not in ("train", "test"):
            raise InvalidParameter(f"{name} has the splits train and test; got {split!r}.")
        arguments["train"] = split == "train"
    else:
        arguments["split"] = split
    # torchvision takes seconds to import; only who asks for one of its sets should wait.
    import torchvision

    with reading.boundary(f"{name} under {root}", *_FOREIGN), pictures.only_known_formats():
        dataset = _torchvision(getattr(torchvision.datasets, name), arguments)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    arrays, labels = Arrays(name), []
    for index in range(count):
        where = f"{name} {split}, image {index}"
        with reading.boundary(where, *_FOREIGN), pictures.only_known_formats():
            image, label = dataset[index]
        arrays.append(pictures.pixels(image, where, size))
        labels.append(int(label))
    named = getattr(dataset, "classes", None)
    classes = tuple(map(str, named)) if named else numbered(labels, name)
    return assemble(arrays, labels, classes, f"{name} {split}")


def _torchvision(make: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return make(**arguments)
    except ValueError as problem:
        split = arguments.get("split", "train" if arguments.get("train") else "test")
        raise InvalidParameter(f"{make.__name__}(split={split!r}): {problem}") from None
    except (RuntimeError, FileNotFoundError) as problem:
        call = ", ".join(
            f"{key}={value!r}" for key, value in {**arguments, "download": True}.items()
        )
        script = f"from torchvision.datasets import {make.__name__}; {make.__name__}({call})"
        raise Unavailable(
            f"{make.__name__} is not under {arguments['root']} ({problem}). "
            f"Fetch it with: python -c {shlex.quote(script)}"
        ) from None


def load(
    spec: str,
    *,
    limit: int | None = None,
    channels: int | None = None,
    classes: Classes | None = None,
) -> ImageSet:
    """The data set that a configuration file names.

    ================================== ======================================================
    ``photos[:SIZE[:PART]]``           bundled photos (PART: victim, surrogate or all)
    ``patches[:SIZE[:N[:PART]]]``      N crops of the bundled photos
    ``digits[:SIZE]``, ``faces[:SIZE]`` bundled digits and face crops
    ``parquet:PATH[@SIZE]``            :func:`parquet`
    ``folder:PATH[@SIZE]``             :func:`image_folder`
    ``torchvision:NAME[/SPLIT]:ROOT[@SIZE]`` :func:`torchvision_set` (test if not said)
    ================================== ======================================================

    Args:
        spec: One of the forms above.
        limit: At most so many images, the first ones.
        channels: 1 makes colour images grey, 3 gives grey ones three equal channels.
        classes: Names of the classes in the order of their labels, or label by name; of a folder,
            the names of its subfolders.

    Raises:
        UnknownName: If the first word is none of these.
        InvalidParameter: If the rest does not fit it.
        InvalidInput: If the files cannot be used.
        Unavailable: If a torchvision set is not on this machine.
    """
    if limit is not None and limit < 1:
        raise InvalidParameter(f"load({shown(spec)}): limit must be positive; got {limit}.")
    names = None if classes is None else named(classes)
    images = _load(spec, limit, names)
    if names is not None and images.classes != names:
        images = renamed(images, names)
    return images if channels is None else images.with_channels(channels)


def _load(spec: str, limit: int | None, names: tuple[str, ...] | None) -> ImageSet:
    kind, _, rest = spec.partition(":")
    if kind in ("photos", "patches", "digits", "faces"):
        images = _load_bundled(kind, rest, spec)
        return images if limit is None else images.subset(range(min(limit, len(images))))
    if kind not in ("parquet", "folder", "torchvision"):
        known = ("photos", "patches", "digits", "faces", "parquet", "folder", "torchvision")
        raise UnknownName("data set", kind, known)
    suffix = re.search(r"@([0-9]+)$", rest)
    size = _positive(suffix[1], spec) if suffix else None
    target = rest[: suffix.start()] if suffix else rest
    if not target:
        raise InvalidParameter(f"{shown(spec)}: expected a path after {kind + ':'!r}.")
    if kind == "parquet":
        return parquet(target, size, limit=limit)
    if kind == "folder":
        return image_folder(target, size, limit=limit, classes=names)
    name, _, root = target.partition(":")
    name, _, split = name.partition("/")
    if not root:
        raise InvalidParameter(
            f"{shown(spec)}: expected torchvision:NAME:ROOT or torchvision:NAME/SPLIT:ROOT."
        )
    return torchvision_set(name, root, split or "test", size=size, limit=limit)


def _load_bundled(kind: str, rest: str, spec: str) -> ImageSet:
    words = rest.split(":") if rest else []
    numbers = 2 if kind == "patches" else 1
    part: str = "victim"
    if kind in ("photos", "patches") and words and words[-1].isalpha():
        part = words.pop()
    if len(words) > numbers:
        raise InvalidParameter(f"{shown(spec)}: {kind!r} does not take {shown(words[numbers])}.")
    values = [_positive(word, spec) for word in words]
    if kind == "photos":
        return bundled.photos(*values, part=part)
    if kind == "patches":
        return bundled.patches(*values, part=part)
    return bundled.digits(*values) if kind == "digits" else bundled.faces(*values)


def _positive(word: str, spec: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,9}", word):
        raise InvalidParameter(
            f"{shown(spec)}: expected a positive number of at most ten digits; got {shown(word)}."
        )
    return int(word)


def _open_parquet(path: Path) -> pq.ParquetFile:
    with reading.boundary(f"The Parquet file {shown(str(path))}"):
        if not path.is_file():
            raise InvalidInput(f"{path}: there is no such file.")
    with needing(f"the Parquet file {shown(str(path))}", "pyarrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    way_out = "It may be truncated or no Parquet file."
    expected = (pa.ArrowException, *_ARROW)
    with reading.boundary(f"The Parquet file {shown(str(path))}", *expected, way_out=way_out):
        return pq.ParquetFile(path)


def _rows(
    file: pq.ParquetFile, path: Path, image: str, label: str, limit: int | None
) -> Iterator[tuple[Any, int | None]]:
    import pyarrow as pa

    left = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
    batches = file.iter_batches(batch_size=min(max(left, 1), 1024), columns=[image, label])
    while left > 0:
        expected = (pa.ArrowException, *_ARROW)
        with reading.boundary(f"{path}: damaged Parquet data, which", *expected):
            batch = next(batches, None)
            if batch is None or batch.num_rows == 0:
                raise InvalidInput(f"{path}: damaged Parquet data: {left} rows are missing.")
            rows = batch.slice(0, left).to_pylist()
        for row in rows:
            yield row[image], row[label]
        left -= batch.num_rows


def _cell_bytes(cell: Any, where: str) -> bytes:
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if isinstance(content, bytes):
        return content
    raise InvalidInput(
        f"{where}: expected the encoded image in bytes; got {type(content).__name__}. Paths are "
        f"not followed; embed the images (datasets: Dataset.to_parquet after cast to Image)."
    )


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...]:
    raw = (metadata or {}).get(b"huggingface")
    if raw is None:
        return ()
    try:
        names = json.loads(raw)["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ()  # other writers put other things there; numbers then serve as names
    return tuple(map(str, names)) if isinstance(names, list) else ()
