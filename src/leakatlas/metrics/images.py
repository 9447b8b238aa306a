r"""How far a reconstructed image is from the private one, pixel by pixel.

Every function takes ``x_hat`` and ``x``, both ``(N, C, H, W)`` in [0, 1], paired by position, and
returns one value an image, ``(N,)`` in float64. Averages are the caller's: the mean of per-image
PSNRs is not the PSNR of the mean MSE.

One and four channels are as good as three. An image that violates the range, holds NaN or does
not have the shape of its partner is an error; so is an image too small for a window.

References:
    Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", IEEE TIP 2004. Wang, Simoncelli and Bovik, "Multiscale Structural
    Similarity for Image Quality Assessment", Asilomar 2003. Guizar-Sicairos, Thurman and Fienup,
    "Efficient Subpixel Image Registration Algorithms", Optics Letters 2008.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.metrics import _checks

PSNR_CAP = 100.0
"""An exact image scores this many dB; its MSE is 1e-10 or less."""

WINDOW = 11
"""Taps of the Gaussian SSIM window (sigma 1.5, cut at 3.5 sigma)."""

MS_SSIM_SIDE = WINDOW * 2**4
"""Smallest side whose fifth scale still holds one SSIM window."""


def mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean squared error over channels and pixels."""
    _checks.pair("mse", x_hat, x)
    return (x_hat.double() - x.double()).square().mean(dim=(1, 2, 3))


def rmse(x_hat: Tensor, x: Tensor) -> Tensor:
    """Root of :func:`mse`."""
    return mse(x_hat, x).sqrt()


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a peak of 1, capped at :data:`PSNR_CAP`."""
    return psnr_of_mse(mse(x_hat, x))


def psnr_of_mse(error: Tensor) -> Tensor:
    """``-10 log10(error)``, capped: a zero error is :data:`PSNR_CAP` dB, not infinite."""
    return -10.0 * error.double().clamp(min=10.0 ** (-PSNR_CAP / 10.0)).log10()


def ssim(x_hat: Tensor, x: Tensor, *, border: Literal["valid", "reflect"] = "valid") -> Tensor:
    """Structural similarity: Gaussian 11x11 window, sigma 1.5, k = (.01, .03), range 1.

    The value per channel is averaged over window positions, then over channels; 1 means equal,
    0 unrelated, negative values mean contrast reversed. Two equal constant images score 1.

    Args:
        x_hat: Reconstructions ``(N, C, H, W)``.
        x: Originals ``(N, C, H, W)``.
        border: ``"valid"`` averages over the positions where the window fits, as the paper and
            scikit-image (which computes it) do. ``"reflect"`` pads the image and averages over
            every pixel, which is the plain output of torchmetrics and defined from 6x6 pixels on.
            The two differ in the third decimal.

    Raises:
        InvalidInput: If a side is shorter than the window (11, or 6 with ``"reflect"``).
    """
    _checks.pair("ssim", x_hat, x)
    if border not in ("valid", "reflect"):
        raise InvalidParameter(f"ssim(border={border!r}): expected 'valid' or 'reflect'.")
    side = min(x.shape[2:])
    smallest = WINDOW if border == "valid" else WINDOW // 2 + 1
    if side < smallest:
        way_out = " or pass border='reflect'" if border == "valid" else ""
        raise InvalidInput(
            f"ssim(border={border!r}): needs sides of at least {smallest} pixels, got "
            f"{tuple(x.shape[2:])}; use mse or psnr{way_out}."
        )
    if x.shape[0] == 0:
        return x.new_zeros(0, dtype=torch.float64)
    if border == "reflect":
        # torchmetrics takes seconds to import, and scoring needs it rarely
        from torchmetrics.functional.image import structural_similarity_index_measure

        padded = structural_similarity_index_measure(
            x_hat.double(), x.double(), sigma=1.5, data_range=1.0, reduction="none"
        )
        assert isinstance(padded, Tensor)
        return padded
    # scikit-image filters rows and columns apart: 40 times faster than torchmetrics' 2-D kernel
    # (and takes a while to import, as SciPy's part for images does)
    from skimage.metrics import structural_similarity

    a, b = (v.detach().double().cpu().numpy() for v in (x_hat, x))
    similarity: Any = structural_similarity  # scikit-image leaves its functions untyped
    values = [
        similarity(
            a[i], b[i], gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=1.0, channel_axis=0,
        )
        for i in range(len(b))
    ]  # fmt: skip
    return torch.tensor(values, dtype=torch.float64, device=x.device)


def rdlv(x_hat: Tensor, x: Tensor, prior: Tensor) -> Tensor:
    """Relative data leakage value of each original, ``(N,)`` [Hatamizadeh et al., 2023].

    By how much the best reconstruction is more like the original than a prior image is, relative
    to the latter: ``max_r (SSIM(x_hat_r, x_i) - SSIM(prior, x_i)) / SSIM(prior, x_i)``. 0 means
    that nothing beyond the prior was learned. Their filter drops updates above 1.

    Args:
        x_hat: Reconstructions ``(M, C, H, W)``, in any order.
        x: Originals ``(N, C, H, W)``.
        prior: The image of the domain ``(C, H, W)``.

    Returns:
        NaN where the prior has no similarity above 0, to which nothing is relative.
    """
    base = ssim(prior.expand_as(x), x)
    best = torch.stack([ssim(one.expand_as(x), x) for one in x_hat]).amax(0)
    return torch.where(base > 0, (best - base) / base, torch.nan)


def ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Multi-scale SSIM with the paper's five scales and weights (torchmetrics).

    Negative contrast terms count as 0, so the value lies in [0, 1].

    Raises:
        InvalidInput: If a side is shorter than 176 pixels: the fifth scale would be smaller than
            the window. Fewer scales are a different measure.
    """
    _checks.pair("ms_ssim", x_hat, x)
    if min(x.shape[2:]) < MS_SSIM_SIDE:
        raise InvalidInput(
            f"ms_ssim: five scales need sides of at least {MS_SSIM_SIDE} pixels, got "
            f"{tuple(x.shape[2:])}; use ssim."
        )
    if x.shape[0] == 0:
        return x.new_zeros(0, dtype=torch.float64)
    from torchmetrics.functional.image import (  # takes seconds
        multiscale_structural_similarity_index_measure,
    )

    value: Tensor = multiscale_structural_similarity_index_measure(
        x_hat.double(), x.double(), sigma=1.5, kernel_size=WINDOW, data_range=1.0,
        reduction="none", normalize="relu",
    )  # fmt: skip
    return value


def log_spectrum(x: Tensor) -> Tensor:
    """``log(1 + |F x|)`` of the orthonormal 2-D Fourier transform, ``(N, C, H, W)``."""
    if not len(x):  # MKL under torch 2.6 refuses an empty batch
        return x.double()
    spectrum: Tensor = torch.fft.fft2(x.double(), norm="ortho")
    return spectrum.abs().log1p()


def spectral_distance(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute difference of the two log spectra; 0 means equal magnitudes.

    Blind to translation, since only magnitudes enter: a shifted copy scores almost 0. Read it
    beside :func:`psnr`, never alone.
    """
    _checks.pair("spectral_distance", x_hat, x)
    return (log_spectrum(x_hat) - log_spectrum(x)).abs().mean(dim=(1, 2, 3))


def spectral_bands(x_hat: Tensor, x: Tensor, *, bands: int = 4) -> Tensor:
    """:func:`spectral_distance` split by radial frequency, ``(N, bands)``, lowest first.

    Radii from 0 to the corner of the frequency plane are cut into ``bands`` rings of equal
    width; a ring that holds no frequency of a very small image is 0.
    """
    _checks.pair("spectral_bands", x_hat, x)
    if bands < 1:
        raise InvalidParameter(f"spectral_bands(bands={bands}): expected a positive number.")
    difference = (log_spectrum(x_hat) - log_spectrum(x)).abs().mean(dim=1)  # (N, H, W)
    height, width = x.shape[2:]
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device=x.device)
    columns = torch.fft.fftfreq(width, dtype=torch.float64, device=x.device)
    radius = (rows[:, None].square() + columns[None, :].square()).sqrt()
    ring = (radius / max(float(radius.max()), 1e-12) * bands).long().clamp(max=bands - 1)
    rings = [difference[:, ring == band] for band in range(bands)]
    return torch.stack(
        [r.mean(dim=1) if r.shape[1] else r.new_zeros(r.shape[0]) for r in rings], dim=1
    )


class Registered(NamedTuple):
    """PSNR after alignment, with all that is needed to judge it.

    Args:
        psnr: The better of raw and aligned, ``(N,)``.
        raw: PSNR without alignment, ``(N,)``.
        shift: Rows and columns by which ``x_hat`` was moved, ``(N, 2)``; zeros where raw won.
    """

    psnr: Tensor
    raw: Tensor
    shift: Tensor


def registered_psnr(x_hat: Tensor, x: Tensor, *, max_shift: float = 0.25) -> Registered:
    """PSNR after the best translation, found by phase correlation (scikit-image).

    The channel mean of ``x_hat`` is registered to that of ``x`` on whole pixels, the image is
    moved (border pixels repeated), and the better of raw and moved PSNR is kept: alignment never
    lowers the score. It can raise that of noise too, so compare with a baseline's.

    Args:
        x_hat: Reconstructions ``(N, C, H, W)``.
        x: Originals ``(N, C, H, W)``.
        max_shift: Largest allowed shift as a share of the side; a larger one is not a
            translation of the same picture but a chance maximum.
    """
    raw = psnr(x_hat, x)
    if not 0 <= max_shift <= 1:
        raise InvalidParameter(f"registered_psnr(max_shift={max_shift}): expected 0 to 1.")
    from scipy import ndimage  # these two take a while to import
    from skimage.registration import phase_cross_correlation

    correlation: Any = phase_cross_correlation
    best, shifts = raw.clone(), torch.zeros(x.shape[0], 2, dtype=torch.float64)
    limit = max_shift * np.array(x.shape[2:])
    for i in range(x.shape[0]):
        moving, fixed = (v[i].double().detach().cpu().numpy() for v in (x_hat, x))
        if np.ptp(moving) == 0 or np.ptp(fixed) == 0:
            continue  # a constant image has no phase to correlate
        shift, _, _ = correlation(fixed.mean(axis=0), moving.mean(axis=0))
        if not np.isfinite(shift).all() or not shift.any() or (np.abs(shift) > limit).any():
            continue
        moved = ndimage.shift(moving, (0, *shift), order=0, mode="nearest")
        aligned = psnr_of_mse(torch.tensor(((moved - fixed) ** 2).mean()))
        if aligned > best[i]:
            best[i] = aligned.to(best.device)
            shifts[i] = torch.from_numpy(np.asarray(shift, dtype=np.float64))
    return Registered(best, raw, shifts.to(x.device))
