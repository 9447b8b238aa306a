import socket

import pytest
import torch

from leakatlas.data import digits, faces, patches, photos
from leakatlas.errors import InvalidParameter, UnknownName


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("bundled data must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("size", [32, 64])
def test_photos_are_eight_classes_of_real_pixels(size: int) -> None:
    victims = photos(size)
    assert victims.images.shape == (8, 3, size, size)
    assert victims.labels.tolist() == list(range(8))
    assert victims.classes[0] == "astronaut"
    # A photo is neither flat nor noise: it varies, and neighbours are alike.
    for image in victims.images:
        assert image.std() > 0.05
        assert (image[:, :, 1:] - image[:, :, :-1]).square().mean() < image.var()


def test_victim_and_surrogate_share_no_photo() -> None:
    victim, surrogate, every = photos(), photos(part="surrogate"), photos(part="all")
    assert not set(victim.classes) & set(surrogate.classes)
    assert set(victim.classes) | set(surrogate.classes) == set(every.classes)
    assert not set(patches(32, 16).classes) & set(patches(32, 16, part="surrogate").classes)


def test_photos_are_the_same_every_time() -> None:
    assert photos(32).fingerprint() == photos(32).fingerprint()


def test_patches_extend_one_sequence_without_repeats() -> None:
    few, many = patches(32, 20), patches(32, 64)
    assert torch.equal(few.images, many.images[:20])
    assert many.labels.bincount().tolist() == [8] * 8
    distances = torch.cdist(many.images.flatten(1), many.images.flatten(1))
    assert (distances + torch.eye(64) > 0.1).all()


def test_faces_are_a_hundred_faces_and_a_hundred_others() -> None:
    crops = faces()
    assert crops.images.shape == (200, 1, 25, 25)
    assert crops.labels.bincount().tolist() == [100, 100]
    # Faces have structure everywhere; the background crops are mostly flat.
    steps = (crops.images[..., 1:] - crops.images[..., :-1]).abs().flatten(1).mean(1)
    assert steps[:100].mean() > 3 * steps[100:].mean()
    assert faces(32).images.shape == (200, 1, 32, 32)


def test_digits_have_ten_classes_and_their_size() -> None:
    small = digits()
    assert small.images.shape == (1797, 1, 8, 8)
    assert small.images.max() == 1
    assert set(small.labels.tolist()) == set(range(10))
    assert digits(16).images.shape == (1797, 1, 16, 16)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UnknownName, match="surrogate"):
        photos(part="suragate")
    with pytest.raises(InvalidParameter, match="n=0"):
        patches(32, 0)
    with pytest.raises(InvalidParameter, match="size"):
        photos(0)
