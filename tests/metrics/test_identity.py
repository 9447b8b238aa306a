"""Verification: thresholds from impostors alone, failures counted, dlib unavailable by name."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable
from leakatlas.metrics import identity
from leakatlas.metrics.identity import face_embeddings, face_models, impostor_threshold, verify


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None]


GALLERY, PEOPLE = line(0, 0.1, 1, 3, 7), torch.tensor([0, 0, 1, 2, 3])
"""Pairs of different people: 0.9, 1, 2, 2.9, 3, 4, 6, 6.9, 7; the pair 0, 0.1 is one person."""


def test_the_threshold_accepts_exactly_the_share_asked_for() -> None:
    for far, accepted in ((0.12, 1), (0.23, 2), (0.5, 4), (0.99, 8)):
        threshold, pairs = impostor_threshold(GALLERY, PEOPLE, far)
        distances = torch.tensor([0.9, 1, 2, 2.9, 3, 4, 6, 6.9, 7], dtype=torch.float64)
        assert pairs == 9
        assert int((distances <= threshold).sum()) == accepted <= far * pairs


def test_ties_are_refused_not_let_through() -> None:
    gallery, people = line(0, 1, 2, 3), torch.arange(4)  # distances 1, 1, 1, 2, 2, 3
    threshold, _ = impostor_threshold(gallery, people, 0.34)
    assert threshold < 1  # two of six may pass, but three are equal


def test_too_few_pairs_for_the_rate_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"needs at least 100 pairs.*got 9"):
        impostor_threshold(GALLERY, PEOPLE, 0.01)
    for far in (0.0, 1.0, float("nan")):
        with pytest.raises(InvalidParameter, match="between 0 and 1"):
            impostor_threshold(GALLERY, PEOPLE, far)
    with pytest.raises(InvalidInput, match=r"people \(M,\)"):
        impostor_threshold(GALLERY, PEOPLE[:3], 0.5)


def test_failures_count() -> None:
    originals = line(0, 1, 3, 7)
    guesses = line(0.5, 1.5, float("nan"), 7)
    found = verify(guesses, originals, GALLERY, PEOPLE, far=0.12)  # threshold just below 1
    assert (found.hits, found.value) == (3, 0.75)  # an embedding that is not a number fails
    assert found.interval.low < 0.75 < found.interval.high and found.impostors == 9
    missing = verify(
        guesses, originals, GALLERY, PEOPLE, far=0.12,
        found=torch.tensor([True, True, True, False]),
    )  # fmt: skip
    assert missing.hits == 2
    with pytest.raises(InvalidInput, match="reconstructions and originals"):
        verify(guesses[:2], originals, GALLERY, PEOPLE, far=0.12)
    with pytest.raises(InvalidInput, match="reconstructions and originals"):
        verify(guesses[:0], originals[:0], GALLERY, PEOPLE, far=0.12)


def test_other_people_are_accepted_at_the_rate_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(200, 8, generator=generator)
    left, right = (torch.randn(2_000, 8, generator=generator) for _ in range(2))
    found = verify(left, right, gallery, torch.arange(200), far=0.05)
    assert found.interval.low < 0.05 < found.interval.high


class FakeDlib:
    """dlib's interface; a face is detected on bright pictures, and a chip is the picture itself."""

    def __init__(self) -> None:
        self.places: list[Any] = []

    def rectangle(self, *corners: int) -> Any:
        return SimpleNamespace(corners=corners)

    def get_face_chip(self, image: Any, shape: Any, *, size: int, padding: float) -> Any:
        assert (size, padding) == (150, 0.25)
        self.places.append(shape)
        return image

    def models(self) -> identity.FaceModels:
        small, large = (SimpleNamespace(corners=(side,), area=lambda s=side: s) for side in (4, 9))
        return identity.FaceModels(
            self,
            SimpleNamespace(compute_face_descriptor=lambda chip: [float(chip.mean())] * 128),
            lambda image, place: place.corners,
            lambda image, _: [small, large] if image.mean() > 128 else [],
        )


def test_a_reconstruction_is_cut_where_the_original_has_its_face() -> None:
    dark, bright = torch.full((1, 1, 20, 16), 0.1), torch.full((1, 1, 20, 16), 0.9)
    fake = FakeDlib()
    embedded, detected = face_embeddings(dark, fake.models(), aligned_by=bright)
    assert fake.places == [(9,)]  # the larger face, found on the original
    assert embedded.shape == (1, 128) and float(embedded[0, 0]) == pytest.approx(25.5, abs=0.6)
    assert detected.tolist() == [True]
    _, detected = face_embeddings(dark, fake.models())
    assert fake.places[-1] == (0, 0, 199, 249) and detected.tolist() == [False]  # all of it
    broken = torch.full_like(dark, float("nan"))
    assert bool(torch.isfinite(face_embeddings(broken, fake.models())[0]).all())
    with pytest.raises(InvalidInput, match="of one size"):
        face_embeddings(dark, fake.models(), aligned_by=bright[..., :5])
    with pytest.raises(InvalidInput, match="1 images aligned by 2"):
        face_embeddings(dark, fake.models(), aligned_by=bright.expand(2, -1, -1, -1))


def test_missing_packages_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in ("dlib", "face_recognition_models") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(Unavailable, match=r"pip install 'leakatlas\[faces\]'"):
        face_models()


def test_dlib_tells_a_face_from_a_cat() -> None:
    pytest.importorskip("dlib", reason="pip install 'leakatlas[faces]'")
    from leakatlas import data

    photos = data.photos(256)
    names = list(photos.classes)
    face, cat = (photos.images[names.index(n)][None].float() for n in ("astronaut", "cat"))
    models = face_models()
    own, seen = face_embeddings(face, models)
    dimmed, _ = face_embeddings(0.9 * face, models, aligned_by=face)
    other, _ = face_embeddings(cat, models, aligned_by=face)
    assert bool(seen) and own.shape == (1, 128)
    assert float((own - dimmed).norm()) < 0.3 < 0.6 < float((own - other).norm())
