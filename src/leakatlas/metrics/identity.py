"""Is it still the same person? Verification at a fixed false-accept rate.

The threshold comes from pairs of *different* people among real images, never from reconstructions,
and the embedding from a network that was trained on other people. dlib's face network answers if
it is installed; its weights come as a package, so nothing is fetched at run time.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.errors import InvalidInput, InvalidParameter, Unavailable
from leakatlas.metrics.intervals import Interval, binomial

CHIP = 150
"""Side of the aligned face that dlib's network was trained on."""

PADDING = 0.25
"""Margin around the landmarks of such a face, as in the network's training."""

WORKING_SIDE = 200
"""Smaller images are enlarged to this before faces and landmarks are sought."""

_NETWORK, _LANDMARKS = (
    "dlib_face_recognition_resnet_model_v1.dat",
    "shape_predictor_5_face_landmarks.dat",
)


@dataclass(frozen=True, kw_only=True)
class Verified:
    """True-accept rate at a fixed false-accept rate.

    Args:
        value: Share of originals whose reconstruction is accepted as the same person.
        hits: Their number.
        interval: Wilson interval of the share.
        far: False-accept rate asked for; also the share that chance accepts.
        threshold: Largest distance that is accepted.
        impostors: Pairs of different people behind the threshold.
        embedding: Whose features these are.
    """

    value: float
    hits: int
    interval: Interval
    far: float
    threshold: float
    impostors: int
    embedding: str


def impostor_threshold(gallery: Tensor, people: Tensor, far: float) -> tuple[float, int]:
    """The largest distance at which at most ``far`` of the pairs of different people are accepted.

    Args:
        gallery: Embeddings of real images ``(M, D)``.
        people: Who is on them ``(M,)``.
        far: False-accept rate in (0, 1).

    Returns:
        The threshold, and the number of impostor pairs.

    Raises:
        InvalidParameter: If ``far`` is not in (0, 1).
        InvalidInput: If there are fewer than ``1 / far`` impostor pairs.
    """
    if not 0 < far < 1:
        raise InvalidParameter(f"far={far}: expected a rate between 0 and 1.")
    if gallery.ndim != 2 or people.shape != gallery.shape[:1]:
        raise InvalidInput(
            f"impostor_threshold: expected a gallery (M, D) and people (M,), got "
            f"{tuple(gallery.shape)} and {tuple(people.shape)}."
        )
    distance = _distances(gallery, gallery)
    other = (people[:, None] != people[None, :]).triu(diagonal=1)
    pairs = distance[other].sort().values
    allowed = int(far * len(pairs))
    if allowed < 1:
        raise InvalidInput(
            f"a false-accept rate of {far} needs at least {round(1 / far)} pairs of different "
            f"people, got {len(pairs)}; enlarge the gallery or raise far."
        )
    # Just below the first pair that must be refused, so that ties do not slip through.
    refused = pairs[allowed] if allowed < len(pairs) else pairs[-1] + 1
    return float(torch.nextafter(refused, refused.new_tensor(-1.0))), len(pairs)


def verify(
    embedded_hat: Tensor,
    embedded: Tensor,
    gallery: Tensor,
    people: Tensor,
    *,
    far: float = 0.01,
    found: Tensor | None = None,
    embedding: str = "given",
) -> Verified:
    """Share of originals whose reconstruction passes for the same person.

    Args:
        embedded_hat: Embeddings of the assigned reconstructions, one an original ``(B, D)``.
        embedded: Embeddings of the originals ``(B, D)``.
        gallery: Embeddings of other real images ``(M, D)``, for the threshold.
        people: Who is on them ``(M,)``.
        far: False-accept rate.
        found: Which originals have a reconstruction at all ``(B,)``; the others are failures.
        embedding: Whose features these are.

    Raises:
        InvalidInput: If shapes do not fit, or the gallery is too small for ``far``.
    """
    if embedded.ndim != 2 or len(embedded) == 0 or embedded_hat.shape != embedded.shape:
        raise InvalidInput(
            f"verify: expected embeddings (B, D) of reconstructions and originals, got "
            f"{tuple(embedded_hat.shape)} and {tuple(embedded.shape)}."
        )
    threshold, impostors = impostor_threshold(gallery, people, far)
    distance = (embedded_hat.double() - embedded.double()).norm(dim=1)
    accepted = distance <= threshold  # a NaN distance is not accepted
    if found is not None:
        accepted &= found.to(accepted)
    hits = int(accepted.sum())
    return Verified(
        value=hits / len(embedded),
        hits=hits,
        interval=binomial(hits, len(embedded)),
        far=far,
        threshold=threshold,
        impostors=impostors,
        embedding=embedding,
    )


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist")


# -- dlib's face network ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FaceModels:
    """dlib with its weights loaded.

    Args:
        library: The module.
        network: Chip to 128 numbers.
        landmarks: Image and rectangle to five points.
        detect: Image to rectangles of faces.
    """

    library: Any
    network: Any
    landmarks: Any
    detect: Callable[..., Sequence[Any]]


def face_models() -> FaceModels:
    """Load dlib's face network with the weights that its companion package carries.

    Raises:
        Unavailable: If dlib, or the package with its weights, is not installed.
    """
    weights = importlib.util.find_spec("face_recognition_models")
    if importlib.util.find_spec("dlib") is None or weights is None or weights.origin is None:
        raise Unavailable(
            "face embeddings: need dlib and the package that carries its weights (100 MB): "
            "pip install 'leakatlas[faces]'"
        )
    folder = Path(weights.origin).parent / "models"  # importing it would load a retired module
    library: Any = importlib.import_module("dlib")
    return FaceModels(
        library,
        library.face_recognition_model_v1(str(folder / _NETWORK)),
        library.shape_predictor(str(folder / _LANDMARKS)),
        library.get_frontal_face_detector(),
    )


def face_embeddings(
    x: Tensor, models: FaceModels, *, aligned_by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """128 numbers for each face; distances below 0.6 are the library's own "same person".

    Args:
        x: ``(N, 1 or 3, H, W)`` in [0, 1], one face each.
        models: From :func:`face_models`.
        aligned_by: Images on which faces and landmarks are sought, ``x`` itself if None. For
            reconstructions give the originals: both are then cut alike, and a reconstruction need
            not be clean enough for a face to be *detected* on it.

    Returns:
        Embeddings ``(N, 128)`` float64, and where a face was detected ``(N,)``; elsewhere the
        whole image is taken for one.

    Raises:
        InvalidInput: If shapes do not fit.
    """
    guides = x if aligned_by is None else aligned_by
    if x.ndim != 4 or x.shape[1] not in (1, 3) or guides.shape[2:] != x.shape[2:]:
        raise InvalidInput(
            f"face_embeddings: expected images (N, 1 or 3, H, W) of one size, got "
            f"{tuple(x.shape)} aligned by {tuple(guides.shape)}."
        )
    if len(guides) != len(x):
        raise InvalidInput(f"face_embeddings: {len(x)} images aligned by {len(guides)}.")
    embedded, detected = [], []
    for image, guide in zip(_as_pictures(x), _as_pictures(guides), strict=True):
        faces = models.detect(guide, 0)
        height, width = guide.shape[:2]
        place = (
            max(faces, key=lambda face: face.area())
            if len(faces)
            else models.library.rectangle(0, 0, width - 1, height - 1)
        )
        chip = models.library.get_face_chip(
            image, models.landmarks(guide, place), size=CHIP, padding=PADDING
        )
        embedded.append(list(models.network.compute_face_descriptor(chip)))
        detected.append(len(faces) > 0)
    return torch.tensor(embedded, dtype=torch.float64), torch.tensor(detected)


def _as_pictures(x: Tensor) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """``(H, W, 3)`` bytes each, enlarged to a side at which a detector can work."""
    x = torch.nan_to_num(x.detach().float().cpu()).clamp(0, 1)
    side = min(x.shape[2:])
    if side < WORKING_SIDE:
        scale = WORKING_SIDE / side
        x = F.interpolate(x, scale_factor=scale, mode="bicubic").clamp(0, 1)
    pictures = (x.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    return [picture.numpy() for picture in pictures]
