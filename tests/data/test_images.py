import dataclasses

import pytest
import torch
from torch import Tensor

from leakatlas.data import ImageSet, patches
from leakatlas.errors import InvalidInput, InvalidParameter


def make(n: int = 6, classes: int = 3) -> ImageSet:
    images = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(n) % classes, tuple("abcdefghij"[:classes]), "made")


def test_subset_keeps_order_labels_and_names() -> None:
    whole = make()
    part = whole.subset([4, 1])
    assert torch.equal(part.images, whole.images[[4, 1]])
    assert part.labels.tolist() == [1, 1]
    assert part.classes == whole.classes
    assert len(whole.subset([])) == 0
    assert part.shape == (3, 4, 4)
    assert part.size == 4


@pytest.mark.parametrize("indices", [[6], [-1], [[0, 1]]])
def test_subset_outside_is_refused(indices: list[int]) -> None:
    with pytest.raises(InvalidInput, match="made"):
        make().subset(indices)


@pytest.mark.parametrize("fraction,first", [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_split_is_disjoint_complete_and_repeatable(fraction: float, first: int) -> None:
    whole = make()
    a, b = whole.split(fraction, torch.Generator().manual_seed(3))
    again, _ = whole.split(fraction, torch.Generator().manual_seed(3))
    assert len(a) == first
    assert a.fingerprint() == again.fingerprint()
    together = torch.cat([a.images, b.images]).flatten(1)
    assert torch.equal(
        together[together[:, 0].argsort()],
        whole.images.flatten(1)[whole.images.flatten(1)[:, 0].argsort()],
    )


def test_split_outside_the_range_is_refused() -> None:
    with pytest.raises(InvalidParameter, match="fraction"):
        make().split(1.5, torch.Generator())


def test_resize_keeps_range_and_constants() -> None:
    small = patches(32, 4).resize(12)
    assert small.images.shape == (4, 3, 12, 12)
    constant = ImageSet(torch.full((1, 1, 8, 8), 0.3), torch.zeros(1).long(), ("a",), "grey")
    assert torch.allclose(constant.resize(5).images, torch.tensor(0.3))
    assert constant.resize(8) is constant
    with pytest.raises(InvalidParameter, match="size"):
        constant.resize(0)


def test_fingerprint_names_the_content_not_the_set() -> None:
    whole = make()
    renamed = dataclasses.replace(whole, name="other")
    assert whole.fingerprint() == renamed.fingerprint()
    changed = whole.images.clone()
    changed[0, 0, 0, 0] += 0.001
    others = (
        dataclasses.replace(whole, images=changed),
        dataclasses.replace(whole, labels=whole.labels.flip(0)),
        dataclasses.replace(whole, classes=("a", "b", "z")),
        whole.subset([0]),
    )
    assert len({whole.fingerprint(), *(other.fingerprint() for other in others)}) == 5


GOOD = torch.rand(2, 1, 3, 3)
ZERO = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "images,labels,word",
    [
        (GOOD[0], ZERO, r"\(N, C, H, W\).*batch dimension"),
        (GOOD.double(), ZERO, "float32"),
        ((GOOD * 255).to(torch.uint8), ZERO, "Divide bytes by 255"),
        (GOOD + torch.tensor(float("nan")), ZERO, "18 values that are not finite"),
        (GOOD * 200 + 2, ZERO, "Divide by 255"),
        (GOOD - 2, ZERO, "Undo the normalisation"),
        (GOOD[:, :, :0], ZERO, "no pixel"),
        (GOOD, ZERO[:1], "2 images came with 1 labels"),
        (GOOD, ZERO.float(), "int64"),
        (GOOD, ZERO + 7, "got 7"),
        (GOOD, ZERO - 1, "got -1"),
    ],
)
def test_misfits_are_named(images: Tensor, labels: Tensor, word: str) -> None:
    with pytest.raises(InvalidInput, match=word):
        ImageSet(images, labels, ("a", "b"), "bad")


def test_a_set_needs_classes() -> None:
    with pytest.raises(InvalidInput, match="class name"):
        ImageSet(GOOD, ZERO, (), "bad")


def test_sides_that_differ_have_no_size() -> None:
    wide = ImageSet(torch.zeros(1, 1, 2, 3), ZERO[:1], ("a",), "wide")
    with pytest.raises(InvalidInput, match="2x3"):
        _ = wide.size
