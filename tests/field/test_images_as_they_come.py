"""Images, labels and classes in the forms that people really hold them.

One scene, five images of 6 x 8 pixels, goes in as every form that means the same; and the forms
that could mean two things are refused with both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import VisionTransformer

import leakatlas
from leakatlas.audit import AuditConfig, doctor
from leakatlas.audit.config import make_plan
from leakatlas.data import Box, ImageSet, as_images, image_folder, load
from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.fl import Update

COUNT, HIGH, WIDE = 5, 6, 8
BYTES = torch.randint(
    0, 256, (COUNT, 3, HIGH, WIDE), generator=torch.Generator().manual_seed(17), dtype=torch.uint8
)
PIXELS = BYTES.float() / 255
LABELS = torch.tensor([3, 0, 2, 2, 1])
BOX = Box(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


class Examples(Dataset[tuple[Any, int]]):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        self.form = form

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.form(PIXELS[index]), int(LABELS[index])


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


FORMS: Mapping[str, Any] = {
    "tensors": (PIXELS, LABELS),
    "list of both": [PIXELS, LABELS.int()],
    "double and int32": (PIXELS.double(), LABELS.to(torch.int32)),
    "bytes": (BYTES, LABELS.to(torch.uint8)),
    "bytes in int32": (BYTES.to(torch.int32), LABELS.tolist()),
    "bytes in floats": (BYTES.float(), LABELS.float()),
    "numpy": (PIXELS.numpy(), LABELS.numpy()),
    "numpy, channels last": (BYTES.permute(0, 2, 3, 1).numpy(), LABELS.numpy()[:, None]),
    "reversed view": (PIXELS.flip(3).numpy()[..., ::-1], LABELS.numpy()),
    "big-endian": (PIXELS.numpy().astype(">f4"), LABELS.numpy().astype(">i8")),
    "16 bits": ((BYTES.numpy().astype(np.uint16) * 257), LABELS),
    "16 bits in int32": ((BYTES.to(torch.int32) * 257), LABELS),
    "list of tensors": (list(PIXELS), list(LABELS)),
    "pictures": ([_picture(one) for one in PIXELS], LABELS.tolist()),
    "one-hot": (PIXELS, nn.functional.one_hot(LABELS, 4)),
    "one-hot floats": (PIXELS, nn.functional.one_hot(LABELS, 4).double().numpy()),
    "mapping": {"img": PIXELS, "label": LABELS},
    "list of pairs": list(zip(PIXELS, LABELS.tolist(), strict=True)),
    "TensorDataset": TensorDataset(PIXELS, LABELS),
    "Dataset of pictures": Examples(_picture),
    "Dataset of channels last": Examples(lambda x: x.permute(1, 2, 0).numpy()),
    "DataLoader": DataLoader(TensorDataset(PIXELS, LABELS), batch_size=2),
    "normalised": (BOX.normalize(PIXELS), LABELS),
    "subclass": (PIXELS.as_subclass(nn.Parameter), LABELS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_batch_is_the_same_batch(form: str) -> None:
    read = as_images(FORMS[form], box=BOX)
    assert read.images.dtype == torch.float32 and read.labels.dtype == torch.int64
    torch.testing.assert_close(read.images, PIXELS, atol=1e-6, rtol=0)
    assert read.labels.equal(LABELS)
    assert read.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("labels", [1, [1], torch.tensor(1), np.int64(1), torch.tensor([[0, 1]])])
@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (torch.rand(3, 5, 7), (1, 3, 5, 7)),
        (torch.rand(5, 7, 3), (1, 3, 5, 7)),
        (torch.rand(5, 7), (1, 1, 5, 7)),
        (_picture(PIXELS[0]), (1, 3, HIGH, WIDE)),
    ],
)
def test_one_image_needs_no_batch_axis(images: Any, shape: tuple[int, ...], labels: Any) -> None:
    read = as_images((images, labels))
    assert tuple(read.images.shape) == shape
    assert read.labels.tolist() == [1]


def test_grey_images_need_no_channel_axis() -> None:
    # Three images, which three channels of one image are not, as there are three labels.
    read = as_images((PIXELS[:3, 0], LABELS[:3]))
    assert read.images.equal(PIXELS[:3, :1])
    assert any("3 grey images" in note for note in read.notes)


def test_targets_of_a_loss_per_output_stay_vectors() -> None:
    one_hot = nn.functional.one_hot(LABELS, 4)
    assert as_images((PIXELS, one_hot), vectors=True).labels.equal(one_hot.float())
    several = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1]])
    assert as_images((PIXELS, several), vectors=True).labels.equal(several.float())
    values = torch.linspace(-1, 2, COUNT)
    assert as_images((PIXELS, values), vectors=True).labels.equal(values[:, None])


@pytest.mark.parametrize("vectors", [False, True])
def test_a_list_of_numbers_is_a_list_of_classes(vectors: bool) -> None:
    read = as_images((PIXELS, LABELS.tolist()), vectors=vectors)
    assert read.labels.equal(LABELS) and read.notes == ()


def test_a_shuffling_loader_has_one_order_and_leaves_the_callers_generator_alone() -> None:
    loader = DataLoader(TensorDataset(PIXELS, LABELS), batch_size=3, shuffle=True)
    before = torch.random.get_rng_state()
    first, second = as_images(loader), as_images(loader)
    assert torch.random.get_rng_state().equal(before)
    assert first.fingerprint() == second.fingerprint()
    assert sorted(first.labels.tolist()) == sorted(LABELS.tolist())
    assert "one order" in first.notes[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (PIXELS, "images without labels"),
        ((PIXELS, LABELS, LABELS), r"3 parts, expected \(images, labels\)"),
        ({"pixels": PIXELS, "label": LABELS}, "expected one of image, images"),
        ("photos", "got str; expected an ImageSet"),
        (iter([(PIXELS, LABELS)]), "expected an ImageSet"),
        ((PIXELS, ["cat"] * COUNT), "labels are names, such as 'cat'"),
        ((PIXELS, [[0], [1, 2]]), "several shapes"),
        ((PIXELS, LABELS + 0.5), r"targets of a model with one output have shape \(N, 1\)"),
        ((PIXELS, None), "labels: got None"),
        ((PIXELS * 3 - 1, LABELS), r"undo the normalisation, or give the mean and std"),
        ((BYTES.int() - 7, LABELS), "must lie in"),
        ((torch.zeros(5, 3, 2, 2, dtype=torch.int64), LABELS), "nearly black, or a binary image"),
        ((np.zeros((5, 3, 9, 3)), LABELS), "channels first or last"),
        ((np.zeros((5, 9, 9, 4)), LABELS), "alpha channel"),
        ((PIXELS.flatten(1), LABELS), r"x\.reshape\(-1, C, H, W\)"),
        ((PIXELS.to(torch.complex64), LABELS), "complex64"),
        ((np.array(["a", "b"]), [0, 1]), "expected numbers in an array"),
        (([PIXELS[0], PIXELS[0, :, 1:]], [0, 1]), "several shapes"),
        (([_picture(PIXELS[0]), _picture(PIXELS[0, :, 1:])], [0, 1]), "several sizes"),
        ((PIXELS, LABELS[:4]), "5 images came with 4 labels"),
        ((PIXELS, LABELS * 10**9), "at most 100,000"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_in_words(given: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        as_images(given)


def test_audits_take_their_batch_and_their_public_images_in_any_form() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HIGH * WIDE, 4))
    report = leakatlas.audit(
        model,
        Examples(_picture),
        surrogate=(PIXELS.flip(0, 3).numpy(), LABELS.flip(0).numpy()),
        attacks=["rgap"], threat="B", budget="paper", rehearsal=False,
    )  # fmt: skip
    assert report.runs


# -- folders ---------------------------------------------------------------------------------------


def _files(root: Path, *folders: str, mode: str = "L") -> Path:
    for place, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        Image.new(mode, (7, 5), 20 + place).save(root / folder / "x.png")
    return root


def test_whole_number_folders_are_the_labels_themselves(tmp_path: Path) -> None:
    read = image_folder(_files(tmp_path, "12", "4", "007"))
    grey = [round(float(image[0, 0, 0]) * 255) for image in read.images]
    assert dict(zip(read.labels.tolist(), grey, strict=True)) == {12: 20, 4: 21, 7: 22}
    assert len(read.classes) == 13
    assert "007 = 7, 12 = 12, 4 = 4" in read.notes[0]


def test_named_folders_are_numbered_in_order_or_as_told(tmp_path: Path) -> None:
    _files(tmp_path, "viral", "bacterial", "none")
    assert "bacterial = 0, none = 1, viral = 2" in image_folder(tmp_path).notes[0]
    told = load(f"folder:{tmp_path}", classes=["none", "bacterial", "viral"])
    assert told.classes == ("none", "bacterial", "viral")
    grey = [round(float(image[0, 0, 0]) * 255) for image in told.images]
    assert grey == [22, 21, 20]  # by label
    apart = load(f"folder:{tmp_path}", classes={"none": 0, "bacterial": 2, "viral": 5})
    assert apart.labels.tolist() == [0, 2, 5]
    assert apart.classes == ("none", "1", "bacterial", "3", "4", "viral")
    with pytest.raises(InvalidInput, match="the folder 'viral' is no class"):
        load(f"folder:{tmp_path}", classes=["none", "bacterial"])


def test_torchvisions_order_of_numbers_can_be_asked_for(tmp_path: Path) -> None:
    _files(tmp_path, "2", "10")
    assert load(f"folder:{tmp_path}").labels.tolist() == [2, 10]
    assert load(f"folder:{tmp_path}", classes=["10", "2"]).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("folders", "classes", "words"),
    [
        (("3", "03"), None, "same whole number"),
        (("3", "4000000"), None, "at most 100,000"),
        (("a",), ["a", "a"], "'a' comes twice"),
        (("a",), {"a": 0, "b": 0}, "one label"),
        (("a",), {"a": -1}, "got -1"),
        (("a",), [], "at least one name"),
        ((".",), ["a", "b"], "in no folder of a class"),
    ],
)
def test_classes_without_one_label_each_are_refused(
    tmp_path: Path, folders: tuple[str, ...], classes: Any, words: str
) -> None:
    if folders == (".",):
        Image.new("L", (3, 3)).save(tmp_path / "x.png")
    else:
        _files(tmp_path, *folders)
    with pytest.raises(InvalidInput, match=words):
        load(f"folder:{tmp_path}", classes=classes)


def test_x_rays_of_16_bits_reach_a_network_of_three_channels(tmp_path: Path) -> None:
    """Grey files in class folders, a network trained on ImageNet's mean and std."""
    for place, name in enumerate(("NORMAL", "PNEUMONIA")):
        (tmp_path / name).mkdir()
        deep = np.full((9, 6), 1000 + 40_000 * place, dtype=np.uint16)
        Image.fromarray(deep).save(tmp_path / name / "scan.tiff")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 7 * 4, 2))\n"
    )
    keys: dict[str, Any] = {
        "model": {"python": f"{tmp_path}/net.py:make"},
        "data": {
            "victims": f"folder:{tmp_path}", "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=r"data\.channels"):
        make_plan(AuditConfig.model_validate(keys), base=tmp_path, command="")
    keys["data"] |= {"channels": 3, "classes": ["PNEUMONIA", "NORMAL"]}
    plan = make_plan(AuditConfig.model_validate(keys), base=tmp_path, command="")
    victims = plan.settings[0].victims
    assert victims.images.shape == (2, 3, 9, 6) and victims.labels.tolist() == [0, 1]
    expected = torch.tensor([41_000, 1000]) / 65535
    torch.testing.assert_close(victims.images[:, 2, 0, 0], expected, atol=1e-6, rtol=0)
    notes = plan.settings[0].stage(letter="B", seed=0).notes
    assert any("NORMAL = 1, PNEUMONIA = 0" in note for note in notes)
    assert any("16 bits" in note and "65535" in note for note in notes)
    assert any("3 equal channels" in note for note in notes)


def test_colour_becomes_grey_as_pillow_makes_it() -> None:
    colour = as_images((PIXELS, LABELS))
    grey = colour.with_channels(1)
    theirs = [np.asarray(_picture(one).convert("L")) for one in PIXELS]
    torch.testing.assert_close(
        grey.images[:, 0] * 255, torch.tensor(np.stack(theirs)).float(), atol=0.51, rtol=0
    )
    assert grey.with_channels(1) is grey
    with pytest.raises(InvalidParameter, match="1 \\(grey\\) or 3"):
        colour.with_channels(4)
    with pytest.raises(InvalidInput, match="neither grey nor RGB"):
        ImageSet(torch.rand(1, 2, 4, 4), torch.zeros(1).long(), ("a",), "radar").with_channels(3)


def test_too_few_images_for_the_clients_names_the_key_that_holds_them_back() -> None:
    keys = {"model": {"builtin": "lenet"}, "data": {"victims": "photos:16"}, "clients": 7}
    with pytest.raises(InvalidInput, match=r"4 images .* 7 clients.*data\.limit .* 4 if left out"):
        make_plan(AuditConfig.model_validate(keys), base=Path(), command="")


class Reshaping(nn.Module):
    """Folds what is too large into more rows, as ``view(-1, ...)`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.reshape(-1, 3 * 16 * 16))
        return out


UNREADABLE: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, int, int], str]] = {
    "an assertion": (
        lambda: VisionTransformer(96, 16, 1, 2, 8, 16, num_classes=6), (3, 48, 48),
        r"Wrong image height.*It reads \(1, 3, 96, 96\): folder:PATH@96, .*that size\.$",
    ),
    "a full layer": (
        lambda: nn.Sequential(nn.Conv2d(3, 2, 5), nn.Flatten(), nn.Linear(2 * 28 * 28, 6)),
        (3, 40, 36), r"It reads \(1, 3, 32, 32\): folder:PATH@32, .*ImageSet\.resize\) gives",
    ),
    "channels alone": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (3, 20, 30), r"It reads \(1, 1, 20, 30\): data\.channels in YAML",
    ),
    "channels and size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 6)), (3, 32, 32),
        r"It reads \(1, 1, 28, 28\): folder:PATH@28, .*that size; data\.channels",
    ),
    "more rows than images": (
        Reshaping, (3, 32, 32), r"it makes 4 rows of one image\. It reads \(1, 3, 16, 16\)",
    ),
    "a size of its own": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 50 * 61, 6)), (3, 50, 60),
        r"one tensor of images: .*change the images: folder:PATH@SIZE.*data\.channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_images_that_a_model_cannot_read_are_answered_with_those_that_it_reads(case: str) -> None:
    build, shape, words = UNREADABLE[case]
    for ask in (doctor, leakatlas.audit):
        with pytest.raises(InvalidInput, match=words):
            ask(build(), (torch.rand(2, *shape), [1, 0]))


def test_a_file_follows_the_answer(tmp_path: Path) -> None:
    for place in range(2):
        folder = tmp_path / "pictures" / str(place)
        folder.mkdir(parents=True)
        _picture(PIXELS[place]).save(folder / "one.png")
    keys = {
        "model": {"builtin": "fc", "kwargs": {"size": 28}},
        "data": {"victims": "folder:pictures"},
    }
    (setting,) = make_plan(AuditConfig.model_validate(keys), base=tmp_path, command="").settings
    with pytest.raises(InvalidInput, match=r"inputs of shape \(1, 3, 6, 8\).*folder:PATH@28"):
        setting.readable()
    keys["data"] = {"victims": "folder:pictures@28"}
    (setting,) = make_plan(AuditConfig.model_validate(keys), base=tmp_path, command="").settings
    assert setting.readable().victims.shape == (3, 28, 28)


def test_a_capture_without_its_images_is_told_where_their_shape_is_said() -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2))
    sent = Update.from_gradients(
        [torch.rand_like(p) for p in net.parameters()], net, num_examples=2
    )
    with pytest.raises(InvalidInput, match=r"It reads \(1, 3, 16, 16\): data\.shape in YAML"):
        doctor(net, captured=sent, input_shape=(3, 17, 17))


@pytest.mark.parametrize("shape", [(1, 10, 17), (3, 19, 10), (1, 16, 16)])
def test_non_square_and_grey_set_ups_are_examined(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(shape[0], 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip
    found = doctor(net, (torch.rand(2, *shape), [2, 0]), threat="B")
    assert found.replay.consistent and found.measures


def test_channels_and_classes_are_given_to_an_audit_as_to_a_file() -> None:
    grey = (PIXELS.mean(1, keepdim=True), LABELS)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * HIGH * WIDE, 4))
    report = leakatlas.audit(
        model, grey, surrogate=(1 - grey[0], LABELS), channels=3, classes={"a": 0, "d": 3},
        threat="D", attacks=["dlg"], attack_parameters={"dlg": {"steps": 1}}, budget="1h",
        rehearsal=False,
    )  # fmt: skip
    (setting,) = report.facts["settings"]
    assert setting["shape"] == [3, HIGH, WIDE]
    found = leakatlas.doctor(model, grey, channels=3, classes=["a", "b", "c", "d"])
    assert any("became 3 equal channels" in finding for finding in found.findings)
    with pytest.raises(InvalidInput, match="classes names 2; the labels go up to 3"):
        leakatlas.doctor(model, grey, channels=3, classes=["a", "b"])
