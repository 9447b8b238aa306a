import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from leakatlas.data import ImageSet, digits, image_folder, load, parquet, photos, torchvision_set
from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable, UnknownName

SHARED = sorted((Path(__file__).parents[2].parent / "shared" / "data").glob("*/test.parquet"))


def picture(image: torch.Tensor) -> Image.Image:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def png(image: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    picture(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path,
    cells: Sequence[Any],
    labels: Sequence[int | None],
    *,
    column: str = "img",
    names: Sequence[str] | None = None,
    metadata: bytes | None = None,
) -> Path:
    table = pa.table({column: cells, "label": pa.array(labels, type=pa.int64())})
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        metadata = json.dumps({"info": {"features": features}}).encode()
    if metadata is not None:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, path)
    return path


def cells(images: torch.Tensor) -> list[dict[str, Any]]:
    return [{"bytes": png(image), "path": "never/opened.png"} for image in images]


def same_pixels(a: ImageSet, b: ImageSet) -> bool:
    return torch.allclose(a.images, (b.images * 255).round() / 255, atol=1e-6)


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_gives_back_pixels_labels_and_names(tmp_path: Path, column: str) -> None:
    victims = photos(32)
    path = write_parquet(
        tmp_path / "photos.parquet",
        cells(victims.images),
        victims.labels.tolist(),
        column=column,
        names=victims.classes,
    )
    read = parquet(path)
    assert same_pixels(read, victims)
    assert read.labels.equal(victims.labels)
    assert read.classes == victims.classes
    assert read.name == "photos"
    assert load(f"parquet:{path}@16").images.shape == (8, 3, 16, 16)
    assert len(load(f"parquet:{path}", limit=3)) == 3


def test_parquet_keeps_grey_grey_and_mixes_into_colour(tmp_path: Path) -> None:
    grey = digits().subset(range(3))
    path = write_parquet(tmp_path / "g.parquet", cells(grey.images), grey.labels.tolist())
    assert same_pixels(parquet(path), grey)
    mixed = cells(grey.images) + cells(photos(8).images)
    read = parquet(write_parquet(tmp_path / "m.parquet", mixed, [0] * 11))
    assert read.shape == (3, 8, 8)
    assert torch.equal(read.images[0, 0], read.images[0, 2])


def test_parquet_without_names_counts(tmp_path: Path) -> None:
    for metadata in (None, b"not json", b'{"info": 3}'):
        path = write_parquet(
            tmp_path / "n.parquet", cells(photos(8).images[:2]), [0, 4], metadata=metadata
        )
        assert parquet(path).classes == ("0", "1", "2", "3", "4")


def test_parquet_size_crops_the_centre_square(tmp_path: Path) -> None:
    wide = torch.zeros(1, 3, 8, 16)
    wide[..., 4:12] = 1.0
    read = parquet(write_parquet(tmp_path / "w.parquet", cells(wide), [0]), 4)
    assert torch.equal(read.images, torch.ones(1, 3, 4, 4))


def test_parquet_of_several_sizes_asks_for_one(tmp_path: Path) -> None:
    both = cells(photos(8).images[:1]) + cells(photos(9).images[:1])
    path = write_parquet(tmp_path / "s.parquet", both, [0, 0])
    with pytest.raises(InvalidInput, match=r"8x8, 9x9.*size="):
        parquet(path)
    assert len(parquet(path, 8)) == 2


def test_damaged_parquet_is_refused_with_file_and_row(tmp_path: Path) -> None:
    good = cells(photos(32).images[:2])
    whole = write_parquet(tmp_path / "good.parquet", good, [0, 1]).read_bytes()
    with pytest.raises(InvalidInput, match="no such file"):
        parquet(tmp_path / "absent.parquet")
    truncated = tmp_path / "truncated.parquet"
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        truncated.write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match="truncated"):
            parquet(truncated)
    cut = {"bytes": good[1]["bytes"][:-100], "path": None}
    with pytest.raises(InvalidInput, match=r"row 1 cannot be read: .*image is damaged"):
        parquet(write_parquet(tmp_path / "cut.parquet", [good[0], cut], [0, 1]))
    text = {"bytes": b"hello", "path": None}
    with pytest.raises(InvalidInput, match=r"row 0: not an image"):
        parquet(write_parquet(tmp_path / "text.parquet", [text], [0]))


def test_flipped_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "w.parquet", cells(photos(16).images), [0] * 8).read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (8,), generator=generator).tolist():
            damaged[place] ^= 0xFF
        path = tmp_path / "damaged.parquet"
        path.write_bytes(bytes(damaged))
        try:
            parquet(path)
        except InvalidInput:
            refused += 1
    assert refused > 30


def test_parquet_never_follows_a_path(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(photos(8).images[0]))
    path = write_parquet(tmp_path / "p.parquet", [{"bytes": None, "path": str(secret)}], [0])
    with pytest.raises(InvalidInput, match=r"row 0.*not followed"):
        parquet(path)


def test_parquet_with_bad_labels_or_columns_is_refused(tmp_path: Path) -> None:
    image = cells(photos(8).images[:1])
    path = tmp_path / "x.parquet"
    with pytest.raises(InvalidInput, match="the label is None"):
        parquet(write_parquet(path, image, [None]))
    with pytest.raises(InvalidInput, match=r"got 5"):
        parquet(write_parquet(path, image, [5], names=("a", "b")))
    with pytest.raises(InvalidInput, match=r"the label is 1000000000000"):
        parquet(write_parquet(path, image, [10**12]))
    with pytest.raises(InvalidInput, match=r"label is -1"):
        parquet(write_parquet(path, image, [-1]))
    with pytest.raises(InvalidInput, match="the file has picture, label"):
        parquet(write_parquet(path, image, [0], column="picture"))
    with pytest.raises(InvalidInput, match="no images"):
        parquet(write_parquet(path, pa.array([], type=pa.binary()), []))
    pq.write_table(pa.table({"img": image, "label": ["cat"]}), path)
    with pytest.raises(InvalidInput, match="integers"):
        parquet(path)


def test_an_enormous_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_000, 8_000)).save(buffer, "PNG")
    path = write_parquet(tmp_path / "b.parquet", [{"bytes": buffer.getvalue(), "path": ""}], [0])
    with pytest.raises(InvalidInput, match="limit"):
        parquet(path)


def test_sixteen_bit_pixels_are_scaled_not_clipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    deep = np.array([[0, 257], [30_000, 65_535]], dtype=np.uint16)
    Image.fromarray(deep).save(buffer, "PNG")
    path = write_parquet(tmp_path / "d.parquet", [{"bytes": buffer.getvalue(), "path": ""}], [0])
    read = parquet(path)
    torch.testing.assert_close(
        read.images[0, 0].double(), torch.tensor(deep / 65535), atol=1e-7, rtol=0
    )
    assert "16 bits" in read.notes[0] and "65535" in read.notes[0]


def test_folder_classes_are_subfolders(tmp_path: Path) -> None:
    victims = photos(16)
    for index, name in enumerate(victims.classes):
        (tmp_path / name).mkdir()
        picture(victims.images[index]).save(tmp_path / name / "one.png")
    (tmp_path / "cat" / "notes.txt").write_text("ignored")
    (tmp_path / ".cache").mkdir()
    read = load(f"folder:{tmp_path}")
    assert read.classes == tuple(sorted(victims.classes))
    order = [victims.classes.index(name) for name in read.classes]
    assert same_pixels(read, victims.subset(order))


def test_flat_folder_is_one_class(tmp_path: Path) -> None:
    for index in (1, 0):
        picture(photos(16).images[index]).save(tmp_path / f"{index}.png")
    read = image_folder(tmp_path, 8)
    assert read.classes == (tmp_path.name,)
    assert read.images.shape == (2, 3, 8, 8)
    assert same_pixels(image_folder(tmp_path), photos(16).subset([0, 1]))


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such folder"):
        image_folder(tmp_path / "absent")
    with pytest.raises(InvalidInput, match="no images"):
        image_folder(tmp_path)
    (tmp_path / "broken.png").write_bytes(png(photos(8).images[0])[:60])
    with pytest.raises(InvalidInput, match=r"broken\.png"):
        image_folder(tmp_path)


def test_torchvision_reads_its_own_files(tmp_path: Path) -> None:
    """Digits written in MNIST's own format, which torchvision reads without checksums."""
    images = digits(28).subset(range(5))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = (images.images[:, 0] * 255).round().to(torch.uint8).numpy()
    for prefix in ("train", "t10k"):
        content = struct.pack(">IIII", 2051, 5, 28, 28) + pixels.tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(content)
        labels = images.labels.numpy().astype(np.uint8).tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 5) + labels)
    for spec in (f"torchvision:MNIST:{tmp_path}", f"torchvision:MNIST/train:{tmp_path}"):
        read = load(spec)
        assert same_pixels(read, images)
        assert read.labels.equal(images.labels)
        assert len(read.classes) == 10
    assert load(f"torchvision:MNIST:{tmp_path}@14", limit=2).images.shape == (2, 1, 14, 14)


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN", "STL10", "MNIST"])
def test_absent_torchvision_set_says_how_to_fetch_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unavailable, match=f"python -c .*{name}.*download=True"):
        torchvision_set(name, tmp_path)


def test_torchvision_names_and_splits_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="CIFAR10"):
        torchvision_set("CIFAR11", tmp_path)
    with pytest.raises(InvalidParameter, match="train and test"):
        torchvision_set("CIFAR10", tmp_path, "validation")
    with pytest.raises(InvalidParameter, match="SVHN"):
        torchvision_set("SVHN", tmp_path, "validation")


@pytest.mark.parametrize(
    "spec,shape",
    [
        ("photos", (8, 3, 32, 32)),
        ("photos:64", (8, 3, 64, 64)),
        ("photos:64:all", (16, 3, 64, 64)),
        ("photos:surrogate", (8, 3, 32, 32)),
        ("patches:16:12", (12, 3, 16, 16)),
        ("patches:16:12:surrogate", (12, 3, 16, 16)),
        ("digits", (1797, 1, 8, 8)),
        ("faces:32", (200, 1, 32, 32)),
    ],
)
def test_bundled_specs(spec: str, shape: tuple[int, ...]) -> None:
    assert load(spec).images.shape == shape
    assert len(load(spec, limit=2)) == 2


def test_unknown_specs_are_refused() -> None:
    with pytest.raises(UnknownName, match="photos"):
        load("photo")
    for spec in (
        "photos:0",
        "digits:big",
        "photos:32:64",
        "faces:25:all",
        "parquet:",
        "torchvision:CIFAR10",
    ):
        with pytest.raises(InvalidParameter, match=spec):
            load(spec)
    with pytest.raises(UnknownName, match="victim"):
        load("photos:32:everyone")
    with pytest.raises(InvalidParameter, match="limit"):
        load("photos", limit=0)


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.parent.name)
def test_real_parquet_files(path: Path) -> None:
    read = load(f"parquet:{path}@32", limit=50)
    assert len(read) == 50
    assert read.size == 32
    assert len(read.classes) >= 10
    assert 0.2 < float(read.images.mean()) < 0.8
