r"""Robbing the Fed: an inserted layer whose neighbouring rows differ by single images.

Fowl, Geiping, Czaja, Goldblum and Goldstein, "Robbing the Fed: Directly Obtaining Private Data in
Federated Learning with Modified Models", ICLR 2022. FedSGD and FedAVG, one round; works on one
update and on an aggregate. Letter G: changing the architecture, and public images for the
quantiles of one scalar h(x) = <w, x>. Neither labels nor learning rate are used.

.. math:: y = W_2\,\mathrm{ReLU}(W_1 x + b_1) + b_2, \quad W_1[i] = w, \quad b_1[i] = -c_i,
          \qquad \hat x_i = \frac{G_W[i] - G_W[i+1]}{G_b[i] - G_b[i+1]}

in front of the benign model, with c_1 < ... < c_k the quantiles of h and all columns of W2 equal.
Bin i then holds the delta-weighted mean of the examples with c_i <= h(x) < c_{i+1}: the image
itself if it is alone, a mixture otherwise. The top bin is the last row as it is. With n examples,
n (1 - 1/k)^(n-1) are expected to be alone.

* ``form="sparse"`` (for FedAVG): a hard tanh on [0, 1], rows divided by their bin's width, so an
  example excites its own row only and other bins survive later local steps; a row is read alone.
* ``one_shot=n``: two thresholds cut one bin of mass 1/n out of an aggregate of any size; it holds
  one example with probability about 1/e.

Candidates are ranked by their bias difference against the noise floor, which bins whose ratio lies
outside of themselves reveal; at most as many are kept as the update has examples.

Departures:
    * Both released read-outs subtract the wrong neighbour: row 0 becomes the batch average and the
      top bin is lost. The formula of the paper is followed.
    * Of surplus candidates, one released code keeps the largest mean gradients and the other the
      smallest; here the largest bias difference is kept, since empty bins are small.
    * Thresholds are empirical quantiles of surrogate images; the released N(0, 1) and Laplace
      quantiles fit neither pixels in [0, 1] nor the spread of a mean over correlated pixels, and
      are options.
    * The default direction is a random unit vector; ``mean`` and the released cosine (``dct``) are
      options.
    * The released W2 = 1 / gain drives the model behind into saturation, where deltas vanish. W2
      is scaled so that the block's output has the size of pixels; ``spread=None`` is as released.
    * Connections that break the equality of the deltas (softmax), and concatenation, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import readout
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View, edits
from leakatlas.params import NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

WEIGHT, BIAS = "block.first.weight", "block.first.bias"


@attack(
    "robbing_the_fed",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class RobbingTheFed(ActiveAttack):
    """Imprint layer and its blind read-out.

    Args:
        bins: Number of bins k (the framework's default; more bins, fewer collisions).
        form: ``cumulative`` (ReLU, differences of rows) or ``sparse`` (hard tanh, single rows).
        direction: The measurement h: ``random``, ``mean`` brightness or ``dct``.
        quantiles: Where the thresholds come from; ``normal`` and ``laplace`` take mean and spread
            of h from the surrogate images.
        connection: ``linear`` passes the block's output on, ``addition`` adds it to the input.
        gain: Factor on W1, divided out in W2 (released: 1 in the configuration, 1e-3 in the class).
        spread: Size of the block's output on an average input; None for W2 = 1 / gain.
        one_shot: If positive, cut one bin of mass 1/one_shot instead of using ``bins``.
        tolerance: Bias differences below this share of the largest bias gradient are rounding;
            1e-12 in float64 and 1e-6 otherwise if None.
    """

    bins: PositiveInt = 64
    form: Literal["cumulative", "sparse"] = "cumulative"
    direction: readout.Measurement = "random"
    quantiles: readout.Quantiles = "empirical"
    connection: Literal["linear", "addition"] = "linear"
    gain: Positive = 1.0
    spread: Positive | None = 1.0
    one_shot: NonNegativeInt = 0
    tolerance: Positive | None = None

    def outlook(self, view: View) -> Outlook:
        """How many images are expected alone in their bin."""
        bins = self.one_shot or self.bins
        expected = readout.expected_singletons(view.num_examples, bins)
        words = f"{expected:.1f} of {view.num_examples} images expected alone in one of {bins} bins"
        if view.protocol.steps(view.num_examples) > 1:
            return Outlook("unknown", f"{words} at the first local step; later ones disturb them")
        return Outlook("applicable", words)

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """Put the imprint block in front of the global model; one round is enough."""
        if view.rounds:
            return None
        like = next(view.model.parameters()).detach()
        shape = tuple(view.input_shape)
        w = readout.measurement(self.direction, shape, like=like, generator=generator)
        h = view.box.normalize(view.surrogate.images.to(like)).flatten(1) @ w
        edges = self.edges(h)
        block = edits.Imprint(
            w,
            edges.to(like),
            form=self.form,
            connection=self.connection,
            gain=self.gain,
            spread=self.spread,
        )
        return Tampering(sent=TamperedModel(edits=(block,)), key={"w": w, "edges": edges.to(like)})

    def edges(self, h: Tensor) -> Tensor:
        """Bin edges for surrogate measurements ``(S,)``: of k bins, or around the one-shot bin."""
        mean, std = float(h.mean()), float(h.std())
        bins = self.one_shot or self.bins
        edges = readout.bin_edges(self.quantiles, bins, values=h, mean=mean, std=std)
        if self.one_shot:
            middle = bins // 2
            return torch.cat([edges[middle : middle + 2], edges[-1:]])
        return edges

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Differences of neighbouring rows (or single rows), ranked without any truth."""
        del generator, watch
        shape = tuple(view.input_shape)
        w, edges = view.key["w"], view.key["edges"]
        state = view.rounds[-1].state
        g_w = readout.sent_change(view.update, state, WEIGHT)
        g_b = readout.sent_change(view.update, state, BIAS)
        if not bool(g_b.abs().max() > 0):
            return nothing_found(shape, "the inserted layer has no bias gradient at all")
        if self.form == "cumulative":
            # The top bin has no upper threshold.
            bounds = torch.cat([edges[:-1], edges.new_tensor([torch.inf])])
            read = readout.cumulative_readout(g_w, g_b, edges[:-1], tolerance=self.tolerance)
        else:
            bounds = edges
            read = readout.ratio_readout(g_w, g_b, tolerance=self.tolerance)
        chosen, confidence, floor = readout.rank_bins(read, w, bounds)
        if self.one_shot:
            first = read.rows[chosen] == 0  # the second bin is everything above it
            chosen, confidence = chosen[first], confidence[first]
        chosen, confidence = chosen[: view.num_examples], confidence[: view.num_examples]
        hit = float(len(read.rows))
        if len(chosen) == 0:
            return nothing_found(shape, "no bin rises above the noise floor", noise_floor=floor)
        images = read.x[chosen].reshape(-1, *shape)
        del read  # at a batch of hundreds of photos, candidates are what takes memory
        low, high = view.box.bounds(images)
        return Reconstruction(
            images=torch.clamp(images, min=low, max=high, out=images),
            confidence=confidence,
            notes={"bins_hit": hit, "noise_floor": floor},
        )
