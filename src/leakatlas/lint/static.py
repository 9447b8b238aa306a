"""Checks of the weights alone, D1 to D7: no data, no forward pass, any state dict.

Every check returns scores in [0, 1] with the evidence in words; 1 is what a published tampering
looks like, and ``thresholds.json`` says how far benign models come. Large layers are judged on
evenly spaced rows and their most energetic columns, which a tampering that works cannot avoid.

Every statistic is taken in float64 on rows of length 1, their columns at the size of what they
are fed (:mod:`leakatlas.lint.layers`): ``s w`` in one layer and ``w' / s`` in the next change none
of them. Only :func:`d4_value_entropy` reads the values as they are, since rounding is its matter;
it does not change if a whole layer is scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leakatlas.data import Box
from leakatlas.lint.findings import Score, share_of
from leakatlas.lint.layers import Anatomy, Layer, unit_rows
from leakatlas.lint.layers import norms as row_norms

ROWS, COLUMNS = 1024, 4096
"""At most so much of a layer is looked at."""

PARALLEL = 0.999
"""Two rows with a larger absolute cosine are one direction."""

FEWEST = 8
"""Statistics over rows, columns or taps need at least so many."""


# -- D1 --------------------------------------------------------------------------------------------


def d1_reference(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    *,
    types: Mapping[str, str] | None = None,
    expected_types: Mapping[str, str] | None = None,
) -> list[Score]:
    """D1: the architecture against the agreed one; any difference counts.

    Args:
        found: Shape of every tensor received, by name.
        expected: Shape of every tensor agreed upon.
        types: Class of every module received, by name; None for a bare state dict.
        expected_types: Likewise of the reference.
    """
    extra, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    odd = [n for n in found if n in expected and found[n] != expected[n]]
    words = []
    if extra:
        words.append(f"not in the reference: {some(extra)}")
    if missing:
        words.append(f"missing: {some(missing)}")
    if odd:
        words.append(f"{odd[0]} is {found[odd[0]]} and should be {expected[odd[0]]}")
    if types is not None and expected_types is not None and not words:
        swapped = [n for n in types if types[n] != expected_types.get(n)]
        if swapped:
            name = swapped[0]
            words.append(
                f"{name or 'the model'} is {types[name]} and should be {expected_types.get(name)}"
            )
    text = "the architecture is not the agreed one (" + "; ".join(words) + ")"
    return [Score("D1/reference", "", float(bool(words)), text)]


def d1_detour(body: Anatomy) -> list[Score]:
    """D1 without a reference: two linear layers that lead from the image back to an image.

    The second one's outputs fill the input of the next convolution, more than one pixel each way;
    or, where no convolution follows, they are as many as the model's own inputs, which a
    convolution may have multiplied for several clients. Benign classifiers do not return to
    pixels. Needs the order of the layers.
    """
    if not body.ordered:
        return []
    scores = []
    for place, (first, second) in enumerate(zip(body.layers, body.layers[1:], strict=False)):
        if not (first.linear and second.linear) or first.bias is None:
            continue
        inputs, outputs = first.rows.shape[1], len(second.rows)
        if len(first.rows) != second.rows.shape[1] or inputs % outputs:
            continue
        behind = body.layers[place + 2 :]
        conv = next((c for c in behind if not c.linear and not _depthwise(c)), None)
        if conv is not None:
            side = math.isqrt(outputs // conv.weight.shape[1])
            back = outputs == conv.weight.shape[1] * side**2 and side >= 4
        else:
            own_size = inputs > outputs if place else inputs == outputs
            back = bool(behind) and _image(outputs) and own_size
        if back:
            scores.append(
                Score(
                    "D1/detour",
                    first.name,
                    1.0,
                    f"with {second.name} it leads {inputs} inputs back to {outputs}, the size of "
                    "an image, in front of the rest of the model",
                )
            )
    return scores or [Score("D1/detour", "", 0.0, "no linear layers in front of the model")]


def _image(size: int) -> bool:
    """Whether so many values can be a square image of one or three channels."""
    sides = {c: math.isqrt(size // c) for c in (1, 3)}
    return any(size == c * side**2 and side >= 4 for c, side in sides.items())


# -- D2 --------------------------------------------------------------------------------------------


def d2_repeated_rows(layer: Layer) -> list[Score]:
    """D2: rows that are one direction, and the stable rank ``|W|_F^2 / |W|_2^2`` of unit rows.

    All rows of an imprint are parallel (stable rank 1); default initialisation has 0.6 m.
    """
    if not layer.linear:
        return []
    unit = sample(layer)
    if len(unit) < FEWEST or unit.shape[1] < FEWEST:
        return []
    cosine = (unit @ unit.T).abs()
    cosine.fill_diagonal_(0)
    parallel = cosine > PARALLEL
    partners = float(parallel.any(dim=1).double().mean())
    largest = int(parallel.sum(dim=1).max()) + 1 if bool(parallel.any()) else 1
    rank = stable_rank(unit)
    count = "all" if largest == len(unit) else f"{largest} of"
    sampled = f" (of {len(layer.rows)}, sampled)" if len(layer.rows) > ROWS else ""
    return [
        Score(
            "D2/partners",
            layer.name,
            partners,
            f"{count} {len(unit)} rows{sampled} are one direction",
        ),
        Score("D2/rank", layer.name, 1 / rank, f"stable rank {rank:.2f} of {min(unit.shape)}"),
    ]


def stable_rank(rows: Tensor) -> float:
    """``|W|_F^2 / |W|_2^2``, at least 1."""
    rows = rows.double()
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    top = torch.ones(len(gram), dtype=torch.float64, device=gram.device)
    for _ in range(50):  # power iteration: the leading eigenvalue is all that is asked for
        top = gram @ top
        top = top / top.norm().clamp(min=torch.finfo(torch.float64).tiny)
    largest = max(float(top @ gram @ top), float(gram.diagonal().max()))
    return max(float(gram.trace()) / largest, 1.0)


# -- D3 --------------------------------------------------------------------------------------------


def d3_bias_pattern(layer: Layer) -> list[Score]:
    """D3: biases that cut a measurement into bins.

    With thresholds ``t_i = -b_i / |w_i|``: their spread times sqrt(n), which is the spread of the
    biases in units of the weights (1 at default initialisation), and how evenly the inner 90 % of
    them follow the quantiles of a Normal, Laplace or uniform law. A *sample* of m from the law
    has ``m (1 - R^2)`` of order one; laid-out quantiles have next to nothing. The head, whose
    biases follow the class frequencies, is left to D7.
    """
    if not layer.linear or layer.bias is None:
        return []
    norms = layer.norms()
    live = norms > 0
    if int(live.sum()) < FEWEST or layer.rows.shape[1] < FEWEST:
        return []
    threshold = -layer.bias.double()[live] / norms[live]
    spread = float(threshold.std()) * layer.rows.shape[1] ** 0.5
    scores = [
        Score(
            "D3/spread",
            layer.name,
            share_of(spread),
            f"biases spread {spread:.3g} times as wide as weights",
        )
    ]
    m = len(threshold)
    if m >= 2 * FEWEST and float(threshold.std()) > 0:
        law, r2 = best_law(threshold.sort().values)
        score = 1 / (1 + 5 * m * (1 - r2))  # 5 puts samples at a fifth to a half
        scores.append(
            Score(
                "D3/quantiles",
                layer.name,
                score,
                f"biases follow {law} quantiles, R2 {r2:.4f}",
            )
        )
    return scores


def best_law(ordered: Tensor) -> tuple[str, float]:
    """The law whose quantiles fit sorted values ``(m,)`` best, and the R^2 of the inner 90 %."""
    m = len(ordered)
    ordered = ordered / ordered.abs().max()
    p = (torch.arange(m, dtype=torch.float64, device=ordered.device) + 0.5) / m
    centred = p - 0.5
    laws = {
        "normal": torch.special.ndtri(p),
        "Laplace": -centred.sign() * torch.log1p(-2 * centred.abs()),
        "uniform": centred,
    }
    cut = max(m // 20, 1)
    fits = {law: _squared_correlation(ordered[cut:-cut], q[cut:-cut]) for law, q in laws.items()}
    law = max(fits, key=lambda name: fits[name])
    return law, fits[law]


def _squared_correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return min(float(a @ b / size) ** 2, 1.0) if size > 0 else 0.0


# -- D4 --------------------------------------------------------------------------------------------


def d4_value_entropy(layer: Layer) -> list[Score]:
    """D4: exact zeros, and one value that fills a matrix or its rows.

    A tensor that is zero altogether is a usual initialisation and carries nothing, so it is left
    out. Pruned or binarised models look the same to this check.
    """
    rows = _spaced(layer.rows, ROWS)
    rows = rows[(rows != 0).any(dim=1)]
    if layer.weight.numel() < 8 * FEWEST or len(rows) == 0:
        return []
    zeros = float((layer.rows == 0).double().mean())
    scores = [Score("D4/zeros", layer.name, zeros, f"{zeros:.1%} of the weights are exactly zero")]
    parts = [modal_share(rows.flatten())]
    parts.append(sum(modal_share(row) for row in _spaced(rows, 64)) / len(_spaced(rows, 64)))
    share = max(parts)
    how = "row by row" if parts[1] > parts[0] else "throughout"
    scores.append(
        Score(
            "D4/constant",
            layer.name,
            share,
            f"one value makes up {share:.1%} of the non-zero weights, {how}",
        )
    )
    return scores


def modal_share(values: Tensor) -> float:
    """Share of the most frequent of the non-zero values; 0 if fewer than 16 are there."""
    values = values[values != 0]
    if len(values) < 2 * FEWEST:
        return 0.0
    values = values[:: -(-len(values) // 65_536)]
    return float(values.unique(return_counts=True)[1].max()) / len(values)


# -- D5 --------------------------------------------------------------------------------------------


def d5_trap_fingerprint(layer: Layer, box: Box | None = None) -> list[Score]:
    """D5: in every row, sorted positive weights over sorted negative ones are one constant s.

    Trap rows hold the same values twice, once negative and once positive times s < 1, shuffled.
    A server that folds a pixel normalisation into them scales each channel: the check is repeated
    with channels brought to one size, as measured and, if the pixel space is known, as agreed.
    For ``d``, the median deviation of the ratios from their median, the score is
    ``1 / (1 + d sqrt(n))``; two independent halves have ``d sqrt(n)`` of order one.

    Args:
        layer: Linear layers only.
        box: Pixel space.
    """
    n = layer.rows.shape[1]
    if not layer.linear or n < 4 * FEWEST:
        return []
    rows = unit_rows(layer.sized(_spaced(layer.rows, ROWS)))
    if len(rows) < FEWEST:
        return []
    scores = [] if coarse(layer) else [_fingerprint(layer.name, rows, box)]
    if len(rows) >= 4 * FEWEST:
        negative = float((rows.sum(dim=1) < 0).double().mean())
        share = max(negative, 1 - negative)
        sign = "negative" if negative >= 0.5 else "positive"
        scores.append(
            Score(
                "D5/row_sums",
                layer.name,
                2 * share - 1,
                f"{share:.0%} of the row sums are {sign}",
            )
        )
    return scores


def coarse(layer: Layer) -> bool:
    """Whether the rows hold so few different values that halves agree by rounding alone.

    Sorted samples of k values agree up to about ``1 / sqrt(k)``; fewer than four values within
    that (as weights of 8 bits have) say nothing of how the rows were made.
    """
    judged: list[bool] = []
    for row in _spaced(layer.rows, 64):
        positive = row[row > 0]
        k = len(positive)
        if min(k, int((row < 0).sum())) >= FEWEST:
            judged.append(len(positive.unique()) < min(k, 4 * k**0.5))
    return 2 * sum(judged) > len(judged)


def _fingerprint(place: str, rows: Tensor, box: Box | None) -> Score:
    best, best_s = 0.0, 1.0
    for variant in _channel_sizes(rows, box):
        judged = [_pairing(row) for row in _spaced(rows, 64) / variant]
        value = float(torch.tensor([score for score, _ in judged]).median())
        if value > best:
            best = value
            best_s = float(torch.tensor([s for _, s in judged]).median())
    return Score(
        "D5/fingerprint",
        place,
        best,
        f"positive weights are the negative ones times {best_s:.3g}, shuffled",
    )


def _channel_sizes(rows: Tensor, box: Box | None) -> list[Tensor]:
    """Factors on columns: none, three equal blocks at their own size, the box's channels."""
    n = rows.shape[1]
    sizes = [rows.new_ones(n)]
    if n % 3 == 0:
        block = rows.unflatten(1, (3, n // 3)).square().mean(dim=(0, 2)).sqrt()
        if bool((block > 0).all()):
            sizes.append(block.repeat_interleave(n // 3))
    if box is not None and n % box.channels == 0:
        sizes.append(rows.new_tensor(box.std).repeat_interleave(n // box.channels))
    return sizes


def _pairing(row: Tensor) -> tuple[float, float]:
    positive = row[row > 0].sort(descending=True).values
    negative = -row[row < 0].sort().values
    k = min(len(positive), len(negative))
    if k < FEWEST or max(len(positive), len(negative)) > 1.1 * k:
        return 0.0, 1.0
    ratio = positive[:k] / negative[:k]
    s = float(ratio.median())
    deviation = float((ratio / s - 1).abs().median())
    return 1 / (1 + deviation * (2 * k) ** 0.5), s


# -- D6 --------------------------------------------------------------------------------------------


def d6_transmit_snr(layer: Layer, *, first: bool) -> list[Score]:
    """D6: kernels that copy. Transmit-SNR ``max|w| / (sum|w| - max|w|)``; above 1 one tap rules.

    The score is SNR / (1 + SNR), the share of the largest tap. Depthwise kernels behind the first
    convolution are left out, since a trained one may well pass its channel on.

    Args:
        layer: Convolutions only; every filter is judged, zero ones apart.
        first: Whether this is the first convolution.
    """
    if layer.linear or layer.rows.shape[1] <= FEWEST or (_depthwise(layer) and not first):
        return []
    size = unit_rows(layer.sized(layer.rows)).abs()
    if len(size) == 0:
        return []
    share = size.max(dim=1).values / size.sum(dim=1)
    copies = int((share > 0.5).sum())
    value = float(share.max())
    snr = value / (1 - value) if value < 1 else math.inf
    what = f"{copies} kernels copy one tap" if copies else "the sharpest kernel"
    return [Score("D6/tap", layer.name, value, f"{what} (transmit-SNR {snr:.3g})")]


def _depthwise(layer: Layer) -> bool:
    return layer.weight.shape[1] == 1 and len(layer.weight) > 1


# -- D7 --------------------------------------------------------------------------------------------


def d7_head(layer: Layer) -> list[Score]:
    """D7: the last layer. Zero rows beside others, one dominant row, biases beyond all logits.

    Rows are compared with every column at norm 1: a few strong features, which classes with many
    examples use, make no strong row. A head that is zero altogether is a usual start of fine-tuning
    and does not count.

    Args:
        layer: The head.
    """
    norms = layer.norms()
    if len(norms) < 2 or not bool(norms.max() > 0):
        return []
    zero = float((norms == 0).double().mean())
    even = _even_norms(layer)
    median, top = float(even.median()), float(even.max())
    ratio = top / median if median else math.inf
    scores = [
        Score(
            "D7/zero_rows",
            layer.name,
            zero,
            f"{int((norms == 0).sum())} of {len(norms)} head rows are exactly zero",
        ),
        Score(
            "D7/row_norms",
            layer.name,
            1 - median / top,
            f"the largest head row is {ratio:.3g} times the median one, all features at one size",
        ),
    ]
    if layer.bias is not None:
        largest = norms.max()
        size = largest * (norms / largest).square().mean().sqrt()
        bias = layer.bias.double()
        reach = float((bias.max() - bias.min()) / size)
        scores.append(
            Score(
                "D7/biases",
                layer.name,
                share_of(reach),
                f"head biases differ by {reach:.3g} row norms",
            )
        )
    return scores


def _even_norms(layer: Layer) -> Tensor:
    """Norms ``(m,)`` of the rows with every column, zero ones apart, at norm 1."""
    largest = layer.rows.abs().amax(dim=0).double()
    live = largest > 0
    chunks = layer.rows.split(layer.chunk())

    def scaled(rows: Tensor) -> Tensor:
        return rows[:, live].double() / largest[live]

    sizes = torch.stack([scaled(rows).square().sum(dim=0) for rows in chunks]).sum(dim=0).sqrt()
    return torch.cat([row_norms(scaled(rows) / sizes) for rows in chunks])


def check_weights(body: Anatomy, box: Box | None = None) -> list[Score]:
    """D1 (without reference) to D7 on every layer."""
    scores = d1_detour(body)
    for layer in body.linear:
        scores += d2_repeated_rows(layer)
        scores += d5_trap_fingerprint(layer, box)
        scores += d7_head(layer) if layer.name == body.head else d3_bias_pattern(layer)
    for layer in body.layers:
        scores += d4_value_entropy(layer)
    for place, layer in enumerate(body.convolutions):
        scores += d6_transmit_snr(layer, first=place == 0)
    return scores


# -- shared ----------------------------------------------------------------------------------------


def sample(layer: Layer) -> Tensor:
    """Unit rows of a layer: evenly spaced ones, and the most energetic columns, if it is large."""
    unit = unit_rows(layer.sized(_spaced(layer.rows, ROWS)))
    if unit.shape[1] > COLUMNS:
        unit = unit_rows(unit[:, unit.square().sum(dim=0).topk(COLUMNS).indices])
    return unit


def _spaced(rows: Tensor, most: int) -> Tensor:
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


def some(names: Sequence[str]) -> str:
    """The first three names, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
