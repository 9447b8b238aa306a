r"""Reading inputs out of the gradient of a linear layer, and the bins that make it possible.

For ``z = W x + b`` with ``delta_i = dL/dz_i``,

.. math:: G_W[i] = \tfrac1B \sum_s \delta_i(s)\, x_s, \qquad
          G_b[i] = \tfrac1B \sum_s \delta_i(s),

so a row that exactly one example excites gives that example as ``G_W[i] / G_b[i]``, whatever the
loss, the label, the reduction, the learning rate or the aggregation weight. Binning layers make
rows (or differences of neighbouring rows) belong to one interval of a scalar measurement
``h(x) = <w, x>`` each. Every function here sees only an update and the adversary's own thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakatlas.data import Box
from leakatlas.errors import InvalidInput
from leakatlas.fl import Update

CACHED = 2**18
"""Values that a read-out handles at once: about 1 MiB of float32, what a core's cache holds."""

Measurement = Literal["mean", "dct", "random"]
Quantiles = Literal["empirical", "normal", "laplace"]


@dataclass(frozen=True)
class Readout:
    """Inputs read from rows of one layer.

    Args:
        x: ``(M, n)`` flat candidates.
        rows: ``(M,)`` the row or bin of each.
        strength: ``(M,)`` the size of the divisor, over the largest one.
    """

    x: Tensor
    rows: Tensor
    strength: Tensor


def sent_change(update: Update, state: Mapping[str, Tensor], name: str) -> Tensor:
    """One tensor of the update as it was sent; weights become ``after - before``.

    Ratios of rows do not depend on sign, scale, learning rate or reduction, so those are left in.

    Args:
        update: The message.
        state: The state that the client received, by name.
        name: Parameter name.

    Raises:
        InvalidInput: If the update does not hold the parameter.
    """
    if name not in update.tensors:
        raise InvalidInput(
            f"The update does not hold {name!r}, which the read-out needs; it holds: "
            f"{', '.join(sorted(update.tensors))}."
        )
    sent = update.tensors[name]
    return sent - state[name] if update.kind == "weights" else sent


# -- ratio read-outs -------------------------------------------------------------------------------


def relative_tolerance(dtype: torch.dtype) -> float:
    """Below this share of the largest value, a bias gradient is rounding: 1e-12 in float64."""
    return 1e-12 if dtype == torch.float64 else 1e-6


def informative_rows(g_b: Tensor, tolerance: float | None = None) -> Tensor:
    """Indices of the rows whose bias gradient ``(m,)`` is more than rounding.

    Args:
        g_b: ``(m,)``.
        tolerance: Relative to the largest magnitude; :func:`relative_tolerance` if None.
    """
    if tolerance is None:
        tolerance = relative_tolerance(g_b.dtype)
    size = g_b.abs()
    return torch.nonzero(size > tolerance * size.max()).flatten()


def ratio_readout(g_w: Tensor, g_b: Tensor, *, tolerance: float | None = None) -> Readout:
    """``G_W[i] / G_b[i]`` of every informative row: the sparse read-out, one row one bin.

    Args:
        g_w: ``(m, n)``.
        g_b: ``(m,)``.
        tolerance: See :func:`informative_rows`.
    """
    _check_rows(g_w, g_b)
    rows = informative_rows(g_b, tolerance)
    divisor = g_b[rows]
    return Readout(quotients(g_w, rows, divisor), rows, divisor.abs() / g_b.abs().max())


def quotients(g_w: Tensor, rows: Tensor, divisor: Tensor, less: Tensor | None = None) -> Tensor:
    """``(G_W[rows] - G_W[less]) / divisor``, with no memory but the result's and a cache's.

    A few rows at a time go through the cache, so that a large update is read once.

    Args:
        g_w: ``(m, n)``, of any strides.
        rows: ``(M,)``.
        divisor: ``(M,)``.
        less: The first rows of ``rows`` have one subtracted, ``(L,)`` with L <= M.

    Returns:
        ``(M, n)``.
    """
    x = g_w.new_empty(len(rows), g_w.shape[1])
    few = max(1, CACHED // max(g_w.shape[1], 1))
    room = g_w.new_empty(0 if less is None else min(few, len(less)), g_w.shape[1])
    for start in range(0, len(rows), few):
        part = slice(start, start + few)
        piece = x[part]
        torch.index_select(g_w, 0, rows[part], out=piece)
        if less is not None and start < len(less):
            inner = len(less[part])
            torch.index_select(g_w, 0, less[part], out=room[:inner])
            piece[:inner] -= room[:inner]
        piece /= divisor[part, None]
    return x


def combined_ratio(g_w: Tensor, g_b: Tensor) -> Tensor:
    r"""The one input behind all rows, ``(n,)``: :math:`\sum_i g_i G_W[i] / \sum_i g_i^2`.

    The least-squares solution of ``g x^T = G_W``, hence the inverse-variance combination of the
    rows when all entries of ``G_W`` carry equal noise. Averaging the ratios instead lets the
    smallest ``g_i`` dominate.

    Args:
        g_w: ``(m, n)``.
        g_b: ``(m,)`` the factors g.

    Raises:
        InvalidInput: If every factor is zero.
    """
    _check_rows(g_w, g_b)
    # Dividing by the largest first: squares of gradients of a saturated model underflow.
    largest = g_b.abs().max()
    if not bool(largest > 0):
        raise InvalidInput("combined_ratio: every factor is zero, so no row carries the input.")
    g = g_b / largest
    return (g @ g_w) / (largest * g.square().sum())


def cumulative_readout(
    g_w: Tensor, g_b: Tensor, thresholds: Tensor, *, tolerance: float | None = None
) -> Readout:
    """Differences of rows that share one direction and fire above rising thresholds (ReLU).

    ``(G_W[i] - G_W[i+1]) / (G_b[i] - G_b[i+1])`` is the delta-weighted mean of the inputs with
    ``c_i <= h(x) < c_{i+1}``; the last row, raw, is the top bin. Only rows of occupied bins are
    gathered, so nothing of the size of ``g_w`` is copied.

    Args:
        g_w: ``(m, n)``, in any order of rows.
        g_b: ``(m,)``.
        thresholds: ``(m,)`` the threshold ``c_i`` of each row.
        tolerance: Relative to the largest ``|G_b|``, since rounding of a difference is relative
            to its terms.

    Returns:
        Bins in rising order of threshold; ``rows`` counts them from 0.
    """
    _check_rows(g_w, g_b)
    order = thresholds.argsort()
    sorted_b = g_b[order]
    step = sorted_b.clone()
    step[:-1] -= sorted_b[1:]
    if tolerance is None:
        tolerance = relative_tolerance(g_b.dtype)
    bins = torch.nonzero(step.abs() > tolerance * g_b.abs().max()).flatten()
    divisor = step[bins]
    # Bins rise, so the top one, which has no neighbour, is the last if it is among them.
    inner = bins[bins < len(order) - 1]
    x = quotients(g_w, order[bins], divisor, order[inner + 1])
    return Readout(x, bins, divisor.abs() / step.abs().max())


def in_own_bin(h: Tensor, rows: Tensor, edges: Tensor, *, slack: float = 1e-3) -> Tensor:
    """Whether each candidate's measurement lies in the bin from which it was read, ``(M,)``.

    True for every single input and for mixtures of one sign; a ratio of noise fails.

    Args:
        h: ``(M,)`` measurements of the candidates.
        rows: ``(M,)`` their bins.
        edges: ``(k + 1,)`` rising, the last may be infinite.
        slack: Tolerated overshoot, as a share of the bin's width.
    """
    low, high = edges[rows], edges[rows + 1]
    width = high - low
    room = slack * torch.where(torch.isfinite(width), width, torch.ones_like(width))
    return (h >= low - room) & (h <= high + room)


def noise_floor(divisors: Tensor, consistent: Tensor, *, share: float = 0.25) -> float:
    """The median size of a divisor that holds nothing but noise.

    Under noise every empty bin shows a ratio that contradicts its bin. Without noise hardly any
    does: only a mixture of two signs can. So a few contradictions say nothing.

    Args:
        divisors: ``(M,)`` magnitudes.
        consistent: ``(M,)`` from :func:`in_own_bin`.
        share: Of the bins must contradict themselves before there is a floor.

    Returns:
        0 if there is no sign of noise.
    """
    wrong = divisors[~consistent]
    if len(wrong) == 0 or len(wrong) < share * len(divisors):
        return 0.0
    return float(wrong.median())


def rank_bins(read: Readout, w: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, float]:
    """Candidates above the noise floor, the strongest first.

    Args:
        read: What was read, one candidate a bin.
        w: ``(n,)`` the measurement.
        bounds: ``(k + 1,)`` what each bin spans.

    Returns:
        Indices into ``read`` ``(M,)``, strength over the noise floor ``(M,)``, and the floor.
    """
    consistent = in_own_bin(read.x @ w, read.rows, bounds)
    # A contradicting bin is noise; below three times their median nothing can be told from it.
    floor = 3 * noise_floor(read.strength, consistent)
    above = torch.nonzero(read.strength > floor).flatten()
    order = above[read.strength[above].argsort(descending=True, stable=True)]
    scale = floor or float(read.strength.min()) if len(read.strength) else 1.0
    return order, read.strength[order] / scale, floor


# -- weight-only read-outs -------------------------------------------------------------------------


def energetic_rows(g_w: Tensor, share: float) -> Tensor:
    """Indices of the rows whose norm exceeds ``share`` of the largest row norm, ``(M,)``."""
    norms = g_w.norm(dim=1)
    return torch.nonzero((norms > share * norms.max()) & (norms > 0)).flatten()


def difference_norms(g_w: Tensor) -> Tensor:
    """Norms ``(m,)`` of every row minus the next one, the last row as it is; nothing is copied.

    Args:
        g_w: ``(m, n)``, rows in rising order of their thresholds.
    """
    norms = g_w.new_empty(len(g_w))
    few = max(1, CACHED // max(g_w.shape[1], 1))
    room = g_w.new_empty(min(few, len(g_w)), g_w.shape[1])
    for start in range(0, len(g_w) - 1, few):
        following = g_w[start + 1 : start + 1 + few]
        inner = len(following)
        torch.sub(g_w[start : start + inner], following, out=room[:inner])
        norms[start : start + inner] = room[:inner].norm(dim=1)
    norms[-1:] = g_w[-1:].norm(dim=1)
    return norms


def scaled_to_measurement(rows: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Rows scaled so that ``<w, row>`` is the value that their bin stands for.

    Args:
        rows: ``(M, n)``, each a multiple of an input, the sign included.
        w: ``(n,)`` the measurement.
        target: ``(M,)`` the middle of each row's bin.

    Returns:
        ``(M, n)``; rows that measure 0 stay as they are.
    """
    h = rows @ w
    safe = torch.where(h == 0, torch.ones_like(h), h)
    factor = torch.where(h == 0, torch.ones_like(h), target / safe)
    return rows * factor[:, None]


def scaled_to_box(rows: Tensor, box: Box, shape: tuple[int, ...], sign: Tensor) -> Tensor:
    """Rows with the given sign, as large as the pixel box allows.

    In a box of plain pixels this is the published rule "scale the row to maximum 1". With a
    normalisation, the factor is the largest at which the brightest pixel is still valid.

    Args:
        rows: ``(M, n)``.
        box: The pixel space.
        shape: ``(C, H, W)``.
        sign: ``(M,)`` +1 or -1 on each row.
    """
    images = (rows * sign[:, None]).reshape(-1, *shape)
    _, high = box.bounds(images)
    positive = images > 0
    # A black pixel below the normalisation mean bounds nothing from above.
    room = torch.where(positive & (high > 0), high / torch.where(positive, images, 1), torch.inf)
    factor = room.flatten(1).amin(dim=1)
    factor = torch.where(torch.isfinite(factor), factor, torch.ones_like(factor))
    return (images * factor[:, None, None, None]).flatten(1)


def plausible(x: Tensor, box: Box, *, slack: float = 0.1, share: float = 0.02) -> Tensor:
    """Whether at most ``share`` of an image's pixels leave the box by over ``slack`` of its width.

    Args:
        x: ``(M, C, H, W)``, model space.
        box: The pixel space.
        slack: As a share of the box.
        share: Of the pixels.
    """
    low, high = box.bounds(x)
    room = slack * (high - low)
    outside = (x < low - room).logical_or_(x > high + room)
    outside = outside.flatten(1)
    return outside.sum(dim=1).double() / outside.shape[1] <= share


def distinct(x: Tensor, confidence: Tensor, *, tolerance: float = 1e-2) -> Tensor:
    """Indices of candidates without near-copies, by falling confidence.

    Args:
        x: ``(M, ...)``.
        confidence: ``(M,)``; of two copies the surer one stays.
        tolerance: Two candidates are copies if their distance is below this share of their norm.
    """
    flat = x.flatten(1)
    # Near-copies have near means, |mean a - mean b| <= |a - b| / sqrt(n): few pairs are compared.
    # The slack is for the rounding of the means themselves.
    means = flat.mean(dim=1).double()
    limits = tolerance * flat.norm(dim=1).double()
    reach = limits / max(flat.shape[1], 1) ** 0.5 * (1 + 1e-3) + 1e-6 * means.abs()
    kept: list[int] = []
    for index in confidence.argsort(descending=True, stable=True).tolist():
        near = (means[kept] - means[index]).abs() <= reach[index]
        copies = (
            float((flat[kept[place]] - flat[index]).norm()) <= float(limits[index])
            for place in torch.nonzero(near).flatten().tolist()
        )
        if not any(copies):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=x.device)


# -- measurements and bins -------------------------------------------------------------------------


def measurement(
    kind: Measurement, shape: tuple[int, ...], *, like: Tensor, generator: torch.Generator
) -> Tensor:
    """The direction w of ``h(x) = <w, x>``, ``(n,)``.

    Args:
        kind: ``mean`` (average brightness), ``dct`` (one cosine over the flat input: mode 32 with
            amplitude 4 * mode / n, as in the authors' framework), ``random`` (a unit direction).
        shape: ``(C, H, W)``.
        like: Gives dtype and device.
        generator: For ``random``.
    """
    n = math.prod(shape)
    if kind == "mean":
        return like.new_full((n,), 1.0 / n)
    if kind == "dct":
        mode = 32
        place = torch.arange(n, dtype=like.dtype, device=like.device)
        return torch.cos(math.pi * (place + 0.5) * mode / n) * (4.0 * mode / n)
    drawn = torch.randn(n, generator=generator, dtype=torch.float64).to(like)
    unit: Tensor = drawn / drawn.norm()
    return unit


def bin_edges(
    quantiles: Quantiles,
    bins: int,
    *,
    values: Tensor | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Edges ``(bins + 1,)`` of bins with equal mass, all finite, in float64.

    The outer edges lie one whole spread of the inner ones beyond them, so that no realistic input
    falls outside.

    Args:
        quantiles: ``empirical`` (of ``values``), ``normal`` or ``laplace`` (of ``mean``, ``std``).
        bins: k.
        values: ``(S,)`` measurements of surrogate data.
        mean: Of the distribution.
        std: Of the distribution.

    Raises:
        InvalidInput: If ``empirical`` comes without at least two different values.
    """
    inner = torch.arange(1, bins, dtype=torch.float64) / bins
    if quantiles == "empirical":
        if values is None or len(values) < 2 or not bool(values.max() > values.min()):
            raise InvalidInput(
                "bin_edges: empirical quantiles need at least two different measurements; give "
                "surrogate images, or choose 'normal' or 'laplace' quantiles."
            )
        values = values.double().cpu()
        edges = values.quantile(inner)
        spread = float(values.max() - values.min())
        low, high = float(values.min()) - spread, float(values.max()) + spread
    else:
        if quantiles == "normal":
            edges = torch.special.ndtri(inner)
        else:  # a Laplace law of standard deviation 1 has scale 1/sqrt(2)
            centred = inner - 0.5
            edges = -centred.sign() * torch.log1p(-2 * centred.abs()) / math.sqrt(2)
        edges = mean + std * edges
        low, high = mean - 10 * std, mean + 10 * std
    return _strictly_rising(torch.cat([edges.new_tensor([low]), edges, edges.new_tensor([high])]))


def bin_middles(edges: Tensor) -> Tensor:
    """The middle ``(k,)`` of every bin of a mean brightness, which lies in [0, 1].

    The outer edges lie beyond what an image can measure; the middle of a whole outer bin would be
    no brightness, and below 0 turn the image into its negative.

    Args:
        edges: ``(k + 1,)`` rising.
    """
    inside = edges.clamp(0, 1)
    return (inside[:-1] + inside[1:]) / 2


def expected_singletons(examples: int, bins: int) -> float:
    """``n (1 - 1/k)^(n-1)``: how many of n examples fall alone into one of k equal bins."""
    return examples * (1 - 1 / bins) ** (examples - 1)


def _strictly_rising(edges: Tensor) -> Tensor:
    """Ties (few or discrete surrogate values) moved apart by the smallest visible amount."""
    step = 1e-9 * float(edges[-1] - edges[0])
    ramp = step * torch.arange(len(edges), dtype=edges.dtype)
    return torch.cummax(edges - ramp, dim=0).values + ramp if _tied(edges) else edges


def _tied(edges: Tensor) -> bool:
    return bool((edges.diff() <= 0).any())


def _check_rows(g_w: Tensor, g_b: Tensor) -> None:
    if g_w.dim() != 2 or g_b.shape != g_w.shape[:1]:
        raise InvalidInput(
            f"A read-out expects G_W (m, n) and G_b (m,), got {tuple(g_w.shape)} and "
            f"{tuple(g_b.shape)}."
        )
