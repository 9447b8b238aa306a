"""D14, self-inversion: the client reads its own update as a malicious server would.

The client has the ground truth, so there is nothing to guess: for every linear layer, all that a
row read-out could give is compared with what the layer was really fed, example by example. This
knows no attack; it knows only that ``G_W[i] = sum_s delta_i(s) x_s``. The read-outs:

* single rows, ``G_W[i] / G_b[i]`` (sparse bins, traps, fishing heads);
* differences of rows next to each other in the order of their thresholds, and of their biases
  (cumulative bins);
* differences of any two rows, where few rows are informative (class decoupling, which subtracts
  an absent class's row);
* single rows, and differences of neighbours, up to a factor (weight-only forms; weight changes
  that are too small for the rounding of the biases).

Gradients and inputs are first brought to size one by a power of two, which changes no bit of what
follows: weights out of a usual range would let float32 norms overflow, or vanish.

The layer's own inputs are compared: pixels for a first layer, copies of pixels behind identity
convolutions, features or latents further on (fishing, latent binning).

Honest fully connected layers leak too: all examples of a small batch, and of a larger one those
that stick out. What counts as tampering is therefore ``(share - chance) / (1 - chance)``, with the
chance that of *twins*: the same architecture with its weights drawn anew.

Departures: similarity is ``|x_hat - x| / |x - mean|`` below :data:`CLOSE` instead of a cosine
above 0.99 after subtracting the mean; at equal length the two agree, and the wrong length fails.
SPEAR is left out: that it succeeds says nothing against the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakatlas.blocks import readout
from leakatlas.fl import stream
from leakatlas.lint.behaviour import Batch, batch_gradient
from leakatlas.lint.findings import Score
from leakatlas.lint.layers import norms

CLOSE = 0.1418
"""``sqrt(2 - 2 * 0.99)``: the distance of two unit vectors with cosine 0.99."""

PAIRS, PAIR_VALUES = 64, 2**26
"""Up to so many informative rows, all their differences are tried, if they fit into 256 MiB."""

TWINS = 3
"""Twins drawn; their shares are averaged, since one draw may leak nothing by chance."""

FEWEST = 12
"""Of so many examples that chance weights do not give away, a share says something. In which of
fewer they give away, untrained honest networks differ too much: most small ones would be taken for
tampered with on a batch of four, one in forty on ten."""

CHUNK = 2**24
"""Candidate values compared at once; bounds memory at 128 MiB or less."""


@dataclass(frozen=True)
class Leak:
    """What one layer's gradient gives away.

    Args:
        place: Layer name.
        found: ``(N,)`` which examples were read.
        how: The read-out that gave most of them.
        pixels: Whether the layer is fed the batch itself.
    """

    place: str
    found: Tensor
    how: str
    pixels: bool

    @property
    def share(self) -> float:
        """Share of the examples."""
        return float(self.found.double().mean())


def d14_self_inversion(
    model: nn.Module,
    batch: Batch,
    gradient: Mapping[str, Tensor],
    *,
    head: str | None,
) -> tuple[list[Score], list[Leak], str]:
    """D14 on one update: shares beyond the twin's, all leaks, and what could not be judged.

    Args:
        model: The received model.
        batch: One example alone always stands in its update: it has leaks, and no score.
        gradient: The client's update (any sign and scale), by parameter name.
        head: Name of the last linear layer, judged on its own.
    """
    leaks = self_inversion(model, batch, gradient)
    if len(batch.x) < 2:
        return [], leaks, "one example alone always stands in its update"
    if not any(leak.share > 0 for leak in leaks):
        words = "no row of the own update holds an example"
        return [Score("D14/hidden", "", 0.0, words), Score("D14/head", "", 0.0, words)], leaks, ""
    twins: dict[str, float] = {}
    for draw in range(TWINS):
        other = twin(model, draw)
        for leak in self_inversion(other, batch, batch_gradient(other, batch)):
            twins[leak.place] = twins.get(leak.place, 0.0) + leak.share / TWINS
    scores, unjudged = [], []
    for leak in leaks:
        chance, count = twins.get(leak.place, 0.0), len(leak.found)
        if count * (1 - chance) < FEWEST:
            unjudged.append(f"{leak.place} ({count * (1 - chance):.3g})")
            continue
        what = "images" if leak.pixels else "inputs of this layer"
        scores.append(
            Score(
                "D14/head" if leak.place == head else "D14/hidden",
                leak.place,
                max((leak.share - chance) / (1 - chance), 0.0),
                f"{int(leak.found.sum())} of {count} own {what} stand in the update "
                f"({leak.how}; chance weights give away {chance * count:.3g})",
            )
        )
    if not unjudged:
        return scores, leaks, ""
    few = f"too few examples that chance weights keep, of {FEWEST}: {', '.join(unjudged)}"
    return scores, leaks, few


def self_inversion(model: nn.Module, batch: Batch, gradient: Mapping[str, Tensor]) -> list[Leak]:
    """Every linear layer's read-outs against its own inputs, of one example too."""
    leaks = []
    state = dict(model.named_parameters())
    for name, x in layer_inputs(model, batch.x).items():
        weight, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
        if weight not in gradient or not bool(gradient[weight].abs().max() > 0):
            continue
        size = power_of_two(gradient[weight])
        g_w = gradient[weight].detach() / size
        ways: dict[str, Tensor] = {"rows scaled": match_directions(energetic(g_w), x)}
        if bias in gradient and bool(gradient[bias].abs().max() > 0):
            g_b = gradient[bias].detach() / size
            length = norms(state[weight].detach().double())
            live = length.clamp(min=torch.finfo(torch.float64).tiny)
            threshold = -state[bias].detach().double() / live
            ways["single rows"] = match(readout.ratio_readout(g_w, g_b).x, x)
            ways["differences of neighbouring rows"] = match(
                readout.cumulative_readout(g_w, g_b, threshold).x, x
            ) | match(readout.cumulative_readout(g_w, g_b, -state[bias].detach()).x, x)
            ways["differences of two rows"] = match(pair_differences(g_w, g_b), x)
            ways["differences scaled"] = match_directions(
                energetic(g_w[threshold.argsort()].diff(dim=0)), x
            )
        found = torch.stack(list(ways.values())).any(dim=0)
        best = max(ways, key=lambda way: int(ways[way].sum()))
        flat = batch.x.flatten(1)
        pixels = x.shape == flat.shape and bool(torch.allclose(x, flat.to(x)))
        leaks.append(Leak(name, found, best, pixels))
    return leaks


@torch.no_grad()
def layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every linear layer is fed, ``(N, n)`` by name, in the model's own mode.

    Layers that are applied to tokens, or more than once, are left out: their rows sum over
    positions as well as examples. Buffers are as before afterwards.
    """
    model = copy.deepcopy(model)
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = _noting(seen, name)
            handles.append(module.register_forward_hook(note))
    with torch.random.fork_rng(devices=[]):
        model(x)
    for handle in handles:
        handle.remove()
    return {
        name: inputs[0]
        for name, inputs in seen.items()
        if len(inputs) == 1 and inputs[0].dim() == 2 and len(inputs[0]) == len(x)
    }


def _noting(
    seen: dict[str, list[Tensor]], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(name, []).append(inputs[0].detach())

    return note


def power_of_two(values: Tensor) -> float:
    """The power of two at or below the largest magnitude; 1 if all are zero or one is infinite."""
    largest = float(values.detach().abs().max())
    return 2.0 ** (math.frexp(largest)[1] - 1) if 0 < largest < math.inf else 1.0


def energetic(g_w: Tensor) -> Tensor:
    """Rows that are more than rounding."""
    return g_w[readout.energetic_rows(g_w, readout.relative_tolerance(g_w.dtype))]


def pair_differences(g_w: Tensor, g_b: Tensor) -> Tensor:
    """``(G_W[i] - G_W[j]) / (G_b[i] - G_b[j])`` for all pairs of the strongest rows, ``(M, n)``.

    Empty if more than :data:`PAIRS` rows are informative (the pairs that matter are then next to
    each other in some order), or if they would not fit.
    """
    strong = g_w.norm(dim=1)
    rows = torch.nonzero(strong > readout.relative_tolerance(g_w.dtype) * strong.max()).flatten()
    if len(rows) > PAIRS or len(rows) ** 2 // 2 * g_w.shape[1] > PAIR_VALUES:
        return g_w[:0]
    i, j = torch.triu_indices(len(rows), len(rows), offset=1, device=g_w.device)
    step = g_b[rows[i]] - g_b[rows[j]]
    keep = step.abs() > readout.relative_tolerance(g_b.dtype) * g_b.abs().max()
    i, j, step = rows[i[keep]], rows[j[keep]], step[keep]
    return (g_w[i] - g_w[j]) / step[:, None]


def match(candidates: Tensor, x: Tensor) -> Tensor:
    """Which inputs ``(N, n)`` some candidate ``(M, n)`` equals, ``(N,)``."""
    size = power_of_two(x)
    x = (x / size).to(torch.promote_types(x.dtype, torch.float32))  # halves have no cdist
    middle = _middle(x)
    centred = x - middle
    spread = centred.norm(dim=1)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for part in candidates.split(max(CHUNK // x.shape[1], 1)):
        part = part / size
        finite = part[torch.isfinite(part).all(dim=1)].to(x) - middle
        if len(finite):
            found |= torch.cdist(centred, finite).amin(dim=1) < CLOSE * spread
    result: Tensor = found & (spread > 0)
    return result


def match_directions(rows: Tensor, x: Tensor) -> Tensor:
    """Which inputs ``(N, n)`` some row ``(M, n)`` equals up to a factor, ``(N,)``."""
    x = x / power_of_two(x)
    spread = (x - _middle(x)).norm(dim=1)
    rows = rows.to(x)
    unit = rows / rows.norm(dim=1, keepdim=True)
    if not len(unit):
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    along = (x @ unit.T).abs().amax(dim=1)
    # x minus its best multiple of a row has this length.
    rest = (x.square().sum(dim=1) - along.square()).clamp(min=0).sqrt()
    result: Tensor = (rest < CLOSE * spread) & (spread > 0)
    return result


def _middle(x: Tensor) -> Tensor:
    """What a read-out must tell an input from: the others' mean, or one input's own grey."""
    return x.mean(dim=0) if len(x) > 1 else x.mean()


def twin(model: nn.Module, draw: int) -> nn.Module:
    """The same architecture with linear and convolution weights drawn anew.

    Uniform with variance 1/(3 fan_in), PyTorch's own default; everything else is kept.
    """
    other = copy.deepcopy(model)
    generator = stream("lint twin", draw)
    with torch.no_grad():
        for module in other.modules():
            if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                continue
            reach = module.weight[0].numel() ** -0.5
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.copy_(((2 * drawn - 1) * reach).to(parameter))
    return other
