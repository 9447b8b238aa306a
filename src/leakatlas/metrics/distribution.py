"""Fréchet distance between sets of images: how real reconstructions look, not what they recover.

A generator that knows nothing of the private batch scores perfectly here, so no verdict rests on
it. The arithmetic is torchmetrics'; Inception's weights are fetched once or the measure is
unavailable, and other features give another measure under another name.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from leakatlas.errors import InvalidInput, Unavailable

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity fetches; the digits are the start of its SHA-256."""

INCEPTION_FEATURES = 2048
"""Width of the pooled features of the published FID."""


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """A Fréchet distance with what must be printed beside it.

    Args:
        value: The distance; 0 for equal mean and covariance.
        measure: Name: "FID" for Inception features alone.
        images_hat: Reconstructions behind it.
        images: Originals behind it.
        features: Width D of the features. With fewer images than D on either side the covariance
            is singular and the value is biased upwards: compare equal numbers only.
    """

    value: float
    measure: str
    images_hat: int
    images: int
    features: int


class _Given(nn.Module):
    """Features that are there already, in the place of torchmetrics' network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Its argument."""
        return features


def frechet_distance(features_hat: Tensor, features: Tensor, *, measure: str) -> Frechet:
    r"""Of Gaussians fitted to two sets of features, by torchmetrics in float64.

    .. math:: |\mu_1 - \mu_2|^2
              + \mathrm{tr}\bigl(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    Args:
        features_hat: Of the reconstructions ``(N, D)``.
        features: Of the originals ``(M, D)``.
        measure: Name that says whose features these are.

    Raises:
        InvalidInput: If a side has fewer than two rows, widths differ, or a value is not finite.
    """
    sides = (features_hat, features)
    if any(s.ndim != 2 or len(s) < 2 for s in sides) or features_hat.shape[1] != features.shape[1]:
        raise InvalidInput(
            f"frechet_distance: expected (N, D) and (M, D) with at least two rows each, got "
            f"{tuple(features_hat.shape)} and {tuple(features.shape)}."
        )
    if not all(bool(torch.isfinite(s).all()) for s in sides):
        raise InvalidInput("frechet_distance: features are not finite.")
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    width = features.shape[1]
    metric = FrechetInceptionDistance(feature=_Given(width)).to(features.device)
    metric.update(features.detach().double(), real=True)
    metric.update(features_hat.detach().double(), real=False)
    return Frechet(
        # Rounding of the matrix root can leave a few 1e-12 below zero.
        value=max(float(metric.compute()), 0.0),
        measure=measure,
        images_hat=len(features_hat),
        images=len(features),
        features=width,
    )


def inception_file() -> Path:
    """Where Inception's weights lie once fetched."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def fid(x_hat: Tensor, x: Tensor, *, batch: int = 32) -> Frechet:
    """Fréchet Inception distance (Heusel et al., NeurIPS 2017), pooled features of width 2048.

    Images are quantised to 8 bits and resized to 299 pixels as in the released TensorFlow code,
    which torch-fidelity reproduces; one channel is repeated to three.

    Args:
        x_hat: Reconstructions ``(N, C, H, W)`` in [0, 1]; need not be paired.
        x: Originals ``(M, C, H, W)`` in [0, 1].
        batch: Images that pass the network at once.

    Raises:
        Unavailable: If torch-fidelity is not installed, or the weights are not on disk.
        InvalidInput: If shapes do not fit, or a side has fewer than two images.
    """
    sides = (x_hat, x)
    if any(s.ndim != 4 or s.shape[1] not in (1, 3) or len(s) < 2 for s in sides):
        raise InvalidInput(
            f"fid: expected at least two images (N, 1 or 3, H, W) on each side, got "
            f"{tuple(x_hat.shape)} and {tuple(x.shape)}."
        )
    if not all(bool(torch.isfinite(s).all()) for s in sides):
        raise InvalidInput("fid: images are not finite.")
    network = _inception()
    found = [
        torch.cat(
            [
                network((s.float().clamp(0, 1) * 255).byte().expand(-1, 3, -1, -1))
                for s in side.split(batch)
            ]
        )
        for side in sides
    ]
    return frechet_distance(*found, measure="FID")


def _inception() -> nn.Module:
    if importlib.util.find_spec("torch_fidelity") is None:
        raise Unavailable(
            "fid: needs torch-fidelity, which is not installed: pip install 'leakatlas[perceptual]'"
        )
    if not inception_file().is_file():
        raise Unavailable(
            f"fid: expected Inception weights at {inception_file()}, found none; fetch them with: "
            'python -c "from torch_fidelity.feature_extractor_inceptionv3 import '
            "FeatureExtractorInceptionV3 as F; F('inception-v3-compat', ['2048'])\""
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    network: nn.Module = NoTrainInceptionV3(
        name="inception-v3-compat",
        features_list=[str(INCEPTION_FEATURES)],
        feature_extractor_weights_path=str(inception_file()),
    )
    return network.eval()
