r"""Trap weights: a linear layer of which hardly any image fires a row, and often only one does.

Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov and Papernot, "When the Curious Abandon Honesty:
Federated Learning Is Not Private", EuroS&P 2023. FedSGD and FedAVG, one round. Letter G as printed;
public images only tune one number s, so it runs as F.

1. In every row of the first linear layer that a ReLU follows, half of the entries (chosen at
   random) are negative, z = -|N(mu, sigma^2)|, the others are the same values times -s in another
   order, s slightly below 1; the bias is zero. For pixels in [0, 1] the sum is mostly negative.
2. An image that fires a row alone stands in that row's gradient,

   .. math:: x = \nabla_{W_i} \mathcal L \,/\, \nabla_{b_i} \mathcal L ,

   for any loss, label, reduction and learning rate; over several local steps as long as no other
   image ever fires the row.
3. Convolutions on the way become copies (one tap; spare channels stay silent); strides and pooling
   only shrink the image.
4. Hits and mixtures are told apart without any truth. Ratios outside the pixel box, or without
   contrast, are no images. Rows that one image fires agree to rounding, while every mixture has
   weights of its own: the number of agreeing rows is the confidence, contrast decides among equals
   (a mean of images is flatter than an image).

Which rows fire does not depend on sigma (the bias is zero); everything depends on s.

Departures:
    * The normalisation of the pixels is folded into the traps (or into the first convolution), so
      that the traps see pixels in [0, 1]; the paper assumes such inputs.
    * ``block_rows`` adds the traps as a block in front of any model, ``x + W2 ReLU(W1 x + b1)``, as
      an independent framework does (64 rows); the paper writes into a layer that is there.
    * Tuning s uses surrogate images; the paper's other sources (one mini-batch, images that leaked
      in an earlier round) give the same number.
    * Agreement and contrast are ours; the paper inspects the rows.
    * Text (embeddings drawn in [0, 1]) is left out: this library reads images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
    nothing_found,
)
from leakatlas.blocks import readout, surgery
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import Update, View, edits
from leakatlas.models.structure import example_input, linear_layers
from leakatlas.params import NonNegative, NonNegativeInt, OpenFraction, Positive
from leakatlas.threat import Knowledge, Vantage

BLOCK = "block.first"


@attack("trap_weights", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.MANIPULATION)
@dataclass(frozen=True, kw_only=True)
class TrapWeights(ActiveAttack):
    """Trap weights in the first linear layer, and the ratio of every row that fired.

    Args:
        scaling: s of the trap weights (0.7 MNIST, 0.95 CIFAR-10, 0.99 ImageNet); None tunes it on
            the surrogate images, which takes letter G.
        sigma: Spread of the negative weights before their sign is fixed; their mean mu is 0.
        block_rows: If positive, insert a block with so many trap rows instead of writing into a
            layer of the model.
        min_contrast: Standard deviation over the pixels, in [0, 1], below which a ratio is no
            image.
        agreement: Rows hold the same image if they differ by less than this share of its norm;
            None for what rounding allows, see :func:`rounding`.
    """

    departs_from_letter = (
        "Public images (SURROGATE) only tune the scaling s, and any public image will do; with a "
        "given s the attack runs as F."
    )

    scaling: OpenFraction | None = 0.95
    sigma: Positive = 0.5
    block_rows: NonNegativeInt = 0
    min_contrast: NonNegative = 0.02
    agreement: Positive | None = None

    def outlook(self, view: View) -> Outlook:
        """A layer that the image reaches, a way to choose s, and rows for the examples."""
        if self.scaling is None and not view.has("surrogate"):
            return Outlook("hopeless", "scaling=None is tuned on surrogate images; there are none")
        carried, rows = tuple(view.input_shape), self.block_rows
        if not rows:
            try:
                path = trap_path(view)
            except UnsupportedModel as problem:
                return Outlook("hopeless", f"{problem} block_rows=1000 inserts a block instead.")
            first = path.convolutions[:1]
            if first and first[0].bias is None and any(view.box.mean):
                return Outlook(
                    "hopeless", "the first convolution has no bias to undo the normalisation with"
                )
            carried, rows = path.carried, path.linear.out_features
        several = view.vantage == Vantage.AGGREGATE and len(view.clients) > 1
        return Outlook(
            "unknown" if several else "applicable",
            f"{rows} trap rows for {view.num_examples} examples, images arrive at "
            f"{carried[1]}x{carried[2]}"
            + (f"; the rows of {len(view.clients)} clients mix in the sum" if several else ""),
        )

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """Trap weights in the global model, or in a block before it; one round is enough."""
        if view.rounds:
            return None
        if self.block_rows:
            carried = tuple(view.input_shape)
            block = self.block(view, self.tuned_or_given(view, carried, generator), generator)
            key = {"carried": torch.tensor(carried), "layer": torch.tensor(-1)}
            return Tampering(sent=TamperedModel(edits=(block,)), key=key)
        model = view.model
        path = trap_path(view, model)
        surgery.set_traps(
            path,
            view.box,
            scaling=self.tuned_or_given(view, path.carried, generator),
            sigma=self.sigma,
            gain=1.0,
            generator=generator,
        )
        key = {
            "carried": torch.tensor(path.carried),
            "layer": torch.tensor(path.index),
            "copied": torch.tensor(bool(path.convolutions)),
        }
        return Tampering(sent=TamperedModel.of(model), key=key)

    def tuned_or_given(
        self, view: View, carried: tuple[int, ...], generator: torch.Generator
    ) -> float:
        """The scaling s: given, or the best one on surrogate images of the size that arrives."""
        if self.scaling is not None:
            return self.scaling
        images = F.interpolate(view.surrogate.images, size=carried[1:], mode="area")
        return surgery.tuned_scaling(images, min(view.num_examples, len(images)), generator)

    def block(self, view: View, s: float, generator: torch.Generator) -> edits.TrapBlock:
        """A block whose traps see pixels in [0, 1] whatever the model's input space."""
        like = next(view.model.parameters()).detach()
        shape = tuple(view.input_shape)
        traps = surgery.trap_rows(
            self.block_rows, math.prod(shape), scaling=s, sigma=self.sigma,
            generator=generator, like=like,
        )  # fmt: skip
        std = like.new_tensor(view.box.std).repeat_interleave(shape[1] * shape[2])
        mean = like.new_tensor(view.box.mean).repeat_interleave(shape[1] * shape[2])
        back = torch.randn(traps.shape[1], len(traps), generator=generator, dtype=torch.float64).to(
            like
        )
        return edits.TrapBlock(traps * std, traps @ mean, back / len(traps))

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Ratios of the rows that fired; equal ones once, the most agreed upon first."""
        del generator, watch
        shape = tuple(view.input_shape)
        carried = tuple(int(size) for size in view.key["carried"])
        name = self.layer_name(view)
        state = view.rounds[-1].state
        g_w = readout.sent_change(view.update, state, f"{name}.weight")
        g_b = readout.sent_change(view.update, state, f"{name}.bias")
        if not bool(g_b.abs().max() > 0):
            return nothing_found(shape, "no example fired any trap row")
        read = readout.ratio_readout(g_w[:, : math.prod(carried)], g_b)
        x = read.x.reshape(-1, *carried)
        # Copying convolutions hand on pixels in [0, 1]; without them the layer saw the input.
        x = view.box.normalize(x) if bool(view.key.get("copied", False)) else x
        contrast = view.box.denormalize(x).flatten(1).std(dim=1, correction=0)
        image = readout.plausible(x, view.box) & (contrast > self.min_contrast)
        notes = {"rows_fired": float(len(x)), "rows_plausible": float(image.sum())}
        if not bool(image.any()):
            return nothing_found(shape, "no row that fired holds an image", **notes)
        x, contrast = x[image], contrast[image]
        tolerance = self.agreement or rounding(view.update)
        kept, rows = agreeing(x.flatten(1), read.strength[image], tolerance)
        # No contrast of values in [0, 1] exceeds 1/2, so it never outweighs a row.
        confidence = rows + contrast[kept]
        order = confidence.argsort(descending=True, stable=True)
        x = x[kept[order]]
        if carried != shape:
            x = F.interpolate(x, size=shape[1:], mode="bilinear", align_corners=False)
        notes["most_agreeing_rows"] = float(rows.max())
        return Reconstruction(images=view.box.clip(x), confidence=confidence[order], notes=notes)

    def layer_name(self, view: View) -> str:
        """The name of the layer that holds the traps."""
        if int(view.key["layer"]) < 0:
            return BLOCK
        names = list(linear_layers(view.model))
        return names[int(view.key["layer"])]


def trap_path(view: View, model: nn.Module | None = None) -> surgery.TrapPath:
    """Where the traps go in ``model``, by default a copy of the view's.

    Raises:
        UnsupportedModel: If no linear layer with bias and ReLU sees the image unchanged.
    """
    model = view.model if model is None else model
    return surgery.find_trap(model, example_input(model, view.input_shape))


def rounding(update: Update) -> float:
    """How far the ratios of two rows with the same image may differ, as a share of its norm.

    Two examples of one class have almost the same delta in every row at initialisation, so the
    mixtures of such a pair resemble each other; only rounding tells them from copies. A gradient
    row keeps its relative precision however small it is; a change of weights has lost what the
    weights outweigh it by.
    """
    exact = readout.relative_tolerance(next(iter(update.tensors.values())).dtype)
    return 10 * exact if update.kind == "gradient" else exact**0.5


def agreeing(x: Tensor, strength: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """One row for every set of rows that agree, the strongest, and how many agree with it.

    Args:
        x: ``(M, n)`` ratios.
        strength: ``(M,)``; a large divisor has the smallest rounding.
        tolerance: Of their distance, as a share of the norm.

    Returns:
        Indices ``(K,)`` and counts ``(K,)``, in order of falling strength.
    """
    # Equal rows have equal means: |mean a - mean b| <= |a - b| / sqrt(n). Few pairs are left.
    mean = x.mean(dim=1)
    limit = tolerance * x.norm(dim=1)
    kept: list[int] = []
    counts: list[int] = []
    for index in strength.argsort(descending=True, stable=True).tolist():
        near = (mean[kept] - mean[index]).abs() <= limit[index] / x.shape[1] ** 0.5
        for place in torch.nonzero(near).flatten().tolist():
            if float((x[kept[place]] - x[index]).norm()) <= float(limit[index]):
                counts[place] += 1
                break
        else:
            kept.append(index)
            counts.append(1)
    return torch.tensor(kept, device=x.device), torch.tensor(counts, device=x.device).to(x)
