r"""CW-SSIM: structural similarity of complex wavelet coefficients, blind to small shifts.

Sampat, Wang, Gupta, Bovik and Markey, "Complex Wavelet Structural Similarity: A New Image
Similarity Index", IEEE TIP 2009, on the steerable pyramid of Portilla and Simoncelli, IJCV 2000.

.. math:: S(c_x, c_y) = \frac{2\,\bigl|\sum_i c_{x,i}\, c_{y,i}^*\bigr| + K}
                             {\sum_i |c_{x,i}|^2 + \sum_i |c_{y,i}|^2 + K}

over the coefficients of one local window of one subband. A small translation turns all phases of a
window alike, which the modulus of the sum ignores; a change of structure turns them apart.

Departures: the pyramid is built on the periodic Fourier transform, each scale decimated by cropping
the spectrum, which is exact for its band. Windows, orientations, scales and channels are averaged
with equal weight. The published number of orientations (16) and window (7) are defaults.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from leakatlas.errors import InvalidInput, InvalidParameter
from leakatlas.metrics import _checks

SILENT = 1e-12
"""Window energy, per coefficient, below which a window holds no structure at all."""


def radial_high(radius: Tensor, level: int) -> Tensor:
    """High-pass of a level: 0 below ``pi / 2^(level+1)``, 1 above ``pi / 2^level``."""
    octaves = (radius.clamp(min=1e-12) / math.pi).log2() + level
    return torch.cos(math.pi / 2 * octaves.clamp(-1, 0))


def radial_low(radius: Tensor, level: int) -> Tensor:
    """The low-pass whose square completes that of :func:`radial_high` to 1."""
    return (1 - radial_high(radius, level).square()).clamp(min=0).sqrt()


def angular(theta: Tensor, orientation: int, orientations: int) -> Tensor:
    """One-sided cosine power around ``pi k / K``: analytic, hence complex coefficients."""
    order = orientations - 1
    scale = 2**order * math.factorial(order) / math.sqrt(orientations * math.factorial(2 * order))
    away = torch.remainder(theta - math.pi * orientation / orientations + math.pi, 2 * math.pi)
    cosine = torch.cos(away - math.pi)
    # with one orientation the power is 0, and 0^0 = 1 must not reach the other half-plane
    return torch.where(cosine > 0, 2 * scale * cosine.clamp(min=0).pow(order), 0.0)


def subbands(x: Tensor, *, scales: int = 2, orientations: int = 16) -> list[Tensor]:
    """Complex subbands of the steerable pyramid, finest scale first.

    Args:
        x: Images ``(N, C, H, W)``.
        scales: Number of octave bands below the high-pass residual.
        orientations: K, angles ``pi k / K``.

    Returns:
        For each scale l = 0, 1, ... a complex tensor ``(N, C, K, H / 2^l, W / 2^l)``.
    """
    height, width = x.shape[2:]
    rows = torch.fft.fftshift(torch.fft.fftfreq(height, dtype=torch.float64, device=x.device))
    columns = torch.fft.fftshift(torch.fft.fftfreq(width, dtype=torch.float64, device=x.device))
    fy, fx = 2 * math.pi * rows[:, None], 2 * math.pi * columns[None, :]
    radius, theta = (fy.square() + fx.square()).sqrt(), torch.atan2(fy, fx)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))
    bands = []
    for level in range(1, scales + 1):
        h, w = math.ceil(height / 2 ** (level - 1)), math.ceil(width / 2 ** (level - 1))
        top, left = height // 2 - h // 2, width // 2 - w // 2
        cut = (..., slice(top, top + h), slice(left, left + w))
        radial = (radial_low(radius, level - 1) * radial_high(radius, level))[cut]
        masks = torch.stack(
            [radial * angular(theta, k, orientations)[cut] for k in range(orientations)]
        )
        kept = spectrum[cut][:, :, None] * masks * (h * w / (height * width))
        bands.append(torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(-2, -1))))
    return bands


def cw_ssim(
    x_hat: Tensor,
    x: Tensor,
    *,
    scales: int = 2,
    orientations: int = 16,
    window: int = 7,
    stability: float = 0.0,
) -> Tensor:
    """Complex wavelet structural similarity in [0, 1], one value an image ``(N,)``.

    Equal images score 1 and a change of contrast by a factor a scores ``2a / (1 + a^2)``. A window
    without structure in either image counts as equal, so two constants score 1.

    Args:
        x_hat: Reconstructions ``(N, C, H, W)`` in [0, 1].
        x: Originals ``(N, C, H, W)`` in [0, 1].
        scales: Octave bands compared.
        orientations: Orientations of each.
        window: Side of the local window, in coefficients of the band.
        stability: K of the formula.

    Raises:
        InvalidInput: If the coarsest band is smaller than the window.
    """
    _checks.pair("cw_ssim", x_hat, x)
    if scales < 1 or orientations < 1 or window < 1 or stability < 0:
        raise InvalidParameter(
            f"cw_ssim: scales, orientations and window must be positive and stability not "
            f"negative, got {scales}, {orientations}, {window}, {stability}."
        )
    smallest = (window - 1) * 2 ** (scales - 1) + 1
    if min(x.shape[2:]) < smallest:
        raise InvalidInput(
            f"cw_ssim(scales={scales}, window={window}): needs sides of at least {smallest} "
            f"pixels, got {tuple(x.shape[2:])}; use fewer scales."
        )
    options = {"scales": scales, "orientations": orientations}
    values = []
    for a, b in zip(subbands(x_hat, **options), subbands(x, **options), strict=True):
        cross = a * b.conj()
        real, imaginary = (_local_mean(part, window) for part in (cross.real, cross.imag))
        both = _local_mean(a.abs().square() + b.abs().square(), window)
        top = 2 * torch.hypot(real, imaginary) + stability
        silent = both < SILENT
        ratio = torch.where(silent, 1.0, top / (both + stability).clamp(min=SILENT))
        values.append(ratio.flatten(1).mean(dim=1))
    return torch.stack(values).mean(dim=0)


def _local_mean(values: Tensor, window: int) -> Tensor:
    """Mean over every full window of the last two dimensions."""
    flat = values.reshape(-1, 1, *values.shape[-2:])
    pooled = F.avg_pool2d(flat, window, stride=1)
    return pooled.reshape(*values.shape[:-2], *pooled.shape[-2:])
