r"""Sybils: alone with the target in a secure sum, and trap weights to read what is left.

Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov and Papernot, "Reconstructing Individual Data
Points in Federated Learning Hardened with Differential Privacy and Secure Aggregation", EuroS&P
2023; the trap weights are those of "When the Curious Abandon Honesty", EuroS&P 2023. FedSGD, one
round. Letter H: choosing the cohort, devices of its own, changed weights; no change of
architecture.

1. The server samples the target and M - 1 of its own devices, which send zeros and *no noise*. The
   secure sum is then the target's update; its own share of distributed DP noise (variance
   sigma^2 C^2 / M) is all the noise there is.
2. Trap weights go into the first linear layer behind which a ReLU stands: per row, half of the
   entries negative, the other half the same values times -s in another order, bias zero. Inputs in
   [0, 1] rarely fire such a row; a row that one example alone fires holds g x. Convolutions on the
   way become copies of the image (single taps), pooling only shrinks it.
3. Read-out under noise. Row i shows g_i x + n. Rows whose neighbouring entries do not resemble
   each other, and which are no valid image either, are noise and give its size; what is far
   longer than that is an image after all. Rows with the same image are clustered and combined by
   inverse variance,

   .. math:: \hat x = \sum_i g_i\, G_W[i] \Big/ \sum_i g_i^2, \qquad g_i = G_b[i] .

4. ``gain``: trap rows are divided by it and the next linear layer multiplied. The model computes
   the same, but the traps' part of the clipped norm grows.

Departures (no code is published, only the abstract was at hand; reconstructed):
    * The normalisation of the pixels is folded into the traps (or into the first convolution), so
      that the traps see pixels in [0, 1] whatever the model's input space.
    * How rows are called noise and clustered is ours; without noise the candidates are those of
      the plain ratio read-out, equal ones once.
    * Candidates behind convolutions are resized to the input's size where strides or pooling
      shrank them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
from leakatlas.data import Box
from leakatlas.fl import FedAVG, View
from leakatlas.models.structure import example_input
from leakatlas.params import OpenFraction, Positive, PositiveInt
from leakatlas.threat import Knowledge


@attack(
    "sybils",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.MANIPULATION | Knowledge.SELECTION,
)
@dataclass(frozen=True, kw_only=True)
class Sybils(ActiveAttack):
    """Trap weights in a cohort of the target and silent devices.

    Args:
        cohort_size: M, the target included (10, 100 and 1000 are of interest).
        scaling: s of the trap weights (0.7 MNIST, 0.95 CIFAR-10, 0.99 ImageNet); None tunes it on
            the surrogate images.
        sigma: Spread of the trap weights; which rows fire does not depend on it.
        gain: Moves norm from the rest of the model to the traps; 1 leaves the weights as they are
            (30 was measured: in a small network it buys as much as ten times the sybils).
        threshold: A row counts if its factor exceeds so many standard deviations of the noise.
        similarity: Rows belong together if the cosine of their images, without the mean and
            corrected for noise, exceeds this.
    """

    version: ClassVar[int] = 2

    cohort_size: PositiveInt = 10
    scaling: OpenFraction | None = 0.95
    sigma: Positive = 0.5
    gain: Positive = 30.0
    threshold: Positive = 5.0
    similarity: OpenFraction = 0.95

    def outlook(self, view: View) -> Outlook:
        """A first linear layer behind a ReLU that the input can be carried to."""
        path = surgery.find_trap(view.model, example_input(view.model, view.input_shape))
        if isinstance(view.protocol, FedAVG):
            return Outlook("unknown", "several local steps disturb the traps")
        size = "x".join(str(side) for side in path.carried[1:])
        return Outlook("applicable", f"the first linear layer can be trapped, at {size} pixels")

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """Trap weights for the target, silence from everyone else."""
        if view.rounds:
            return None
        model = view.model
        shape = tuple(view.input_shape)
        path = surgery.find_trap(model, example_input(model, shape))
        s = self.scaling
        if s is None:
            images = F.interpolate(view.surrogate.images, size=path.carried[1:], mode="area")
            s = surgery.tuned_scaling(images, min(view.num_examples, len(images)), generator)
        surgery.set_traps(
            path, view.box, scaling=s, sigma=self.sigma, gain=self.gain, generator=generator
        )
        key = {
            "carried": torch.tensor(path.carried),
            "normalised": torch.tensor(float(not path.convolutions)),
            "scaling": torch.tensor(s, dtype=torch.float64),
            "layer": torch.tensor(path.index),
        }
        return Tampering(
            sent=TamperedModel.of(model),
            key=key,
            cohort=(view.target,),
            sybils=self.cohort_size - 1,
        )

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Noise level, clusters of rows, one image per cluster."""
        del generator, watch
        shape = tuple(view.input_shape)
        carried = tuple(int(size) for size in view.key["carried"])
        model = view.model
        name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][
            int(view.key["layer"])
        ]
        state = view.rounds[-1].state
        g_w = readout.sent_change(view.update, state, f"{name}.weight")
        g_b = readout.sent_change(view.update, state, f"{name}.bias")
        rows = g_w[:, : math.prod(carried)]
        # Without convolutions the layer saw the model's input, else the pixels that they copied.
        carries_input = bool(view.key["normalised"])
        low, high = valid(view.box, carried, rows, normalised=carries_input)
        live, noise = live_rows(rows, g_b, low, high)
        live &= g_b.abs() > max(
            self.threshold * noise,
            readout.relative_tolerance(g_b.dtype) * float(g_b.abs().max()),
        )
        if not bool(live.any()):
            return nothing_found(shape, "no trap row rises above the noise", noise=noise)
        found = cluster(rows[live], g_b[live], noise, self.similarity)
        images = torch.stack([c.x for c in found]).reshape(-1, *carried)
        if carried != shape:
            images = F.interpolate(images, size=shape[1:], mode="bilinear", align_corners=False)
        images = images if carries_input else view.box.normalize(images)
        weight = torch.stack([c.weight for c in found]).sqrt()
        return Reconstruction(
            images=view.box.clip(images),
            confidence=weight / (noise or float(weight.max())),
            notes={
                "noise": noise,
                "live_rows": float(live.sum()),
                "rows_in_largest_cluster": float(max(c.rows for c in found)),
            },
        )


# -- reading rows under noise ----------------------------------------------------------------------


def valid(
    box: Box, shape: tuple[int, ...], like: Tensor, *, normalised: bool
) -> tuple[Tensor, Tensor]:
    """Least and greatest value of every entry of an image ``shape``, each ``(n,)``."""
    low, high = (like.new_full(shape, end) for end in (box.low, box.high))
    if normalised:
        low, high = box.normalize(low), box.normalize(high)
    return low.flatten(), high.flatten()


def live_rows(
    rows: Tensor, g_b: Tensor, low: Tensor, high: Tensor, *, score: float = 6.0
) -> tuple[Tensor, float]:
    """Which rows hold an image or a mixture, and the noise's spread from those that do not.

    A row is live for any of three reasons. Neighbouring pixels resemble each other, so the products
    of neighbouring entries add up to far more than those of independent noise, whose sum is normal
    around zero. Divided by its factor it is a valid image, in every entry: without noise that finds
    what has too few pixels, or too lively ones, for the first. And it is longer than the noise of
    the other rows explains, whose squared length follows a chi-square law.

    Args:
        rows: ``(m, n)``, pixels of a row of the image side by side.
        g_b: ``(m,)``, their factors.
        low: ``(n,)``, least valid value of every entry of an image.
        high: ``(n,)``, greatest.
        score: Standard deviations from which on a row is live.

    Returns:
        ``(m,)`` mask, and the standard deviation per entry; 0 if there are no noisy rows.
    """
    n = rows.shape[1]
    energy = rows.square().sum(dim=1)
    product = (rows[:, 1:] * rows[:, :-1]).sum(dim=1)
    smooth = product * n**0.5 / energy.clamp(min=torch.finfo(rows.dtype).tiny) > score

    slack = 1e-3 * (high - low)
    ratio = rows / g_b[:, None]  # not a number in rows that are zero: no image
    image = ((ratio >= low - slack) & (ratio <= high + slack)).all(dim=1)

    live = (smooth | image) & (energy > 0)
    dead = energy[~live] / n
    level = float(dead.median()) if len(dead) else 0.0
    live |= energy / n > level * (1 + score * (2 / n) ** 0.5)
    return live, level**0.5


@dataclass
class Cluster:
    """Rows that hold one image.

    Args:
        x: ``(n,)`` their inverse-variance combination.
        weight: Sum of the squared factors; the variance of x is noise^2 / weight.
        rows: How many.
    """

    x: Tensor
    weight: Tensor
    rows: int


def cluster(rows: Tensor, g: Tensor, noise: float, similarity: float) -> list[Cluster]:
    """Greedy clustering, strongest row first.

    A row joins the most similar cluster if their distance is what the noise explains (six standard
    deviations of its chi-square law) *and* their cosine is high. Cosines are taken without the mean
    over pixels, which all images share, and with the noise's expected part of each squared norm
    removed.

    Args:
        rows: ``(m, n)`` ``g_i x + noise``.
        g: ``(m,)``.
        noise: Standard deviation per entry.
        similarity: Least cosine.
    """
    n = rows.shape[1]
    explained = 1 + 6 * (2 / n) ** 0.5
    rounding = readout.relative_tolerance(rows.dtype) * 10
    combined = rows.new_empty(0, n)
    weights = rows.new_empty(0)
    members: list[int] = []
    for i in g.abs().argsort(descending=True, stable=True).tolist():
        x, weight = rows[i] / g[i], g[i].square()
        if len(members):
            shape = x - x.mean()
            shapes = combined - combined.mean(dim=1, keepdim=True)
            energy = shape.square().sum() - n * noise**2 / weight
            energies = shapes.square().sum(dim=1) - n * noise**2 / weights
            scale = (energies.clamp(min=0) * energy.clamp(min=0)).sqrt()
            cosine = torch.where(scale > 0, shapes @ shape / scale, torch.zeros_like(scale))
            distance = (combined - x).square().sum(dim=1)
            limit = explained * n * noise**2 * (1 / weights + 1 / weight)
            near = distance <= limit + (rounding * x.norm()) ** 2
            cosine = torch.where(near, cosine, -torch.ones_like(cosine))
            at = int(cosine.argmax())
            if float(cosine[at]) > similarity:
                total = weights[at] + weight
                combined[at] = (weights[at] * combined[at] + g[i] * rows[i]) / total
                weights[at] = total
                members[at] += 1
                continue
        combined = torch.cat([combined, x[None]])
        weights = torch.cat([weights, weight[None]])
        members.append(1)
    return [Cluster(x, w, count) for x, w, count in zip(combined, weights, members, strict=True)]
