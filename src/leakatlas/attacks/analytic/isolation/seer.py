r"""SEER: a model trained so that, in its gradient, one image of the batch drowns out the others.

Garov, Dimitrov, Jovanović and Vechev, "Hiding in Plain Sight: Disguising Data Stealing Attacks in
Federated Learning", ICLR 2024. FedSGD in train mode, one round, one client or a sum over several.
Letter G: changed parameters (never the architecture), public images. Nothing in the weights looks
built by hand.

1. A property p(x), relative to the batch, picks one image: the brightest (or the darkest). It is
   relative because batch normalisation lets every image see the others.
2. The server keeps a fixed random subset of the gradient's entries and a secret *linear* decoder
   r(g) = A g + b on them; the disaggregator in front of it is the identity, as in the default.
3. Offline (:meth:`SEER.prepare`), model and decoder learn together on public batches. With g+ the
   part of the summed gradient that the picked image x+ contributes and g- that of all the others,

   .. math:: L = \frac{\lVert r(g^+) - x^+ \rVert^2 + \alpha\, \lVert r(g^-) - r(0) \rVert^2}
                      {1 + \alpha}, \qquad \log_2 \alpha: -2 \to \log_2 B

   linearly over the first half of the steps. Since r is linear, r(g) = r(g+) + (r(g-) - r(0)).
   The target r(0) for the others matters: without it the decoder returns the mean image.
4. The client trains on the learned weights, and r reads its image off the gradient: no iterations.

In a sum over N clients (``form="thresh"``) every client normalises with its own batch, so p is the
brightness in standard deviations of the image's own batch, and the image is the one that passes a
threshold. With F1 and F2 the distributions of the largest and second largest p of a batch,

.. math:: \tau = \arg\max_\tau \; (F_2(\tau) - F_1(\tau))\, F_1(\tau)^{N-1} ,

which is the chance (over N) that exactly one image of all passes; for many clients it comes to
about 1/e. Half of the training batches hold one image that passes; the others hold none and count
as negative whole. Alpha ends at N B.

On a held-out part of the public images the adversary knows how well this works, against r(0), the
best guess without any gradient: ``public_psnr`` and ``null_psnr`` in the notes.

Paper scale (a million steps with second derivatives, a decoder of 5e8 weights) takes a large
accelerator; :meth:`SEER.tuned` learns in minutes for small images and batches.

Departures:
    * Batches with and without an image that passes tau are found among many random ones; the
      released code shifts the brightness of one batch until it fits, which leaves the pixel box.
    * tau is the best of the observed values of p. The released code searches the product
      ``(1 - F1) F2 F1^(N-1)`` by golden section: as if the largest and the second largest of one
      batch were independent, and as if the empirical distributions were no steps.
    * Brightness and darkness are the properties; colour, edges and random filters are left out.
    * Released code decodes the others twice, as a random unit mixture and as their sum over
      sqrt(B - 1), and weights the mean of the two by alpha. Here it is their plain sum, as in the
      formula: at equal alpha about B - 1 times heavier (``negatives`` scales it). Its target r(0)
      is held constant there, so that the decoder's bias feels the others; here it cancels.
    * Accumulated batches are computed at once (``batches``), each normalised on its own.
    * Entries of the gradient are scaled by one number before the decoder; the decoder's bias
      starts at the public mean image. Both change where a linear map starts, not what it can be.
    * Public images of classes that the model lacks (anybody's photos) get labels in turn: the
      server trains on whatever it likes. Dropout and stochastic depth are at their expectation
      while it learns.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakatlas.attacks.api import (
    ActiveAttack,
    Outlook,
    Reconstruction,
    TamperedModel,
    Tampering,
    attack,
)
from leakatlas.blocks import surgery
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.data import ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.fl import View, draws
from leakatlas.models.structure import batchnorm_layers, has_batchnorm, in_mode
from leakatlas.params import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge, Vantage

MOST_DRAWS = 10_000
"""Random batches that are looked at for one training step."""

HELD_OUT = 0.125
"""Share of the public images on which the decoder is judged."""


@attack(
    "seer",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE | Knowledge.MANIPULATION,
)
@dataclass(frozen=True, kw_only=True)
class SEER(ActiveAttack):
    """Joint training of the shared model and a secret linear decoder.

    Args:
        steps: Training steps (paper: 1,000 epochs of 1,000).
        batches: Public batches per step (paper: accumulation over 10).
        lr: Adam's step size (paper: 1e-4).
        entries: Least number of gradient entries kept of each tensor (8,400; ImageNet 9,800).
        share: Share of each tensor's entries, if that is more (0.1 %; ImageNet 2 %).
        property: Which image of a batch is read: the ``bright`` or the ``dark`` one.
        form: ``max`` reads one client's extreme image, ``thresh`` the one image of a sum over
            clients that passes a threshold.
        clients: N that ``thresh`` is trained for; 0 for as many as there are.
        negatives: Weight of the others' term relative to the published schedule; 0 leaves it out.
        batch_size: Images per public batch B; 0 for as many as the client has.
    """

    version: ClassVar[int] = 2

    steps: PositiveInt = 1_000_000
    batches: PositiveInt = 10
    lr: Positive = 1e-4
    entries: PositiveInt = 8_400
    share: Fraction = 0.001
    property: Literal["bright", "dark"] = "bright"
    form: Literal["max", "thresh"] = "max"
    clients: NonNegativeInt = 0
    negatives: NonNegative = 1.0
    batch_size: NonNegativeInt = 0

    @classmethod
    def tuned(cls) -> Self:
        """Minutes on one core for small images and a batch of 8."""
        return cls(steps=1_000, batches=8, lr=3e-3, entries=1_000)

    def outlook(self, view: View) -> Outlook:
        """Public images, batch normalisation that sees the batch, one client."""
        if not view.has("surrogate"):
            return Outlook("hopeless", "model and decoder are learned from surrogate images")
        several = view.vantage == Vantage.AGGREGATE and len(view.clients) > 1
        if several and self.form == "max":
            return Outlook(
                "hopeless", "the single-client form reads one batch, not a sum; form='thresh' does"
            )
        if not has_batchnorm(view.model):
            return Outlook("unknown", "without batch normalisation no image sees its batch")
        if view.has("protocol"):
            if view.protocol.mode == "eval":
                return Outlook("unknown", "in eval mode no image of a batch sees the others")
            if view.protocol.steps(view.num_examples) > 1:
                return Outlook("unknown", "each local step has a brightest image of its own")
        if self.form == "thresh":
            return Outlook(
                "unknown",
                "one image of the sum, in the third of all rounds in which exactly one passes the "
                "threshold, after long training",
            )
        return Outlook("applicable", f"one of {view.num_examples} images, after long training")

    # -- offline ---------------------------------------------------------------------------------

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """Learn shared weights and decoder.

        Args:
            surrogate: Public images.
            model: The global model behind :class:`~leakatlas.blocks.surgery.Normalise`, so that it
                reads pixels.
            generator: Kept entries, batches, decoder.
            watch: Budget.

        Returns:
            ``model/<name>``, ``index/<name>`` (kept entries), ``A``, ``b``, ``scale``,
            ``public_psnr`` and ``null_psnr``.

        Raises:
            InvalidInput: If there are too few public images for one batch.
        """
        public, held = surrogate.split(1 - HELD_OUT, generator)
        if len(held) < self.batch_size:  # judged on what was learned from, rather than not at all
            public = held = surrogate
        if len(public) < self.batch_size or not self.batch_size:
            raise InvalidInput(
                f"SEER(batch_size={self.batch_size}) learns from batches of that many of the "
                f"{len(surrogate)} surrogate images; give more images, or a batch_size from 1 on."
            )
        model = seeing_the_batch(model)
        theta = dict(model.named_parameters())
        index = {
            name: torch.randperm(p.numel(), generator=generator)[: self.kept(p.numel())]
            for name, p in theta.items()
        }

        threshold = self.threshold(public, generator) if self.form == "thresh" else None

        def draw(images: ImageSet, count: int) -> tuple[Tensor, Tensor, Tensor]:
            chosen = self.batches_of(self.measured(images), count, threshold, generator)
            x, y = images.images[chosen], images.labels[chosen]
            return x, y, self.picked(x, threshold)

        x, y, positive = draw(public, self.batches)
        first = kept_entries(weighted_gradients(model, theta, x, y, positive), index).detach()
        count = first.shape[1]
        scale = 1 / (first.square().mean().sqrt() * count**0.5).clamp(min=1e-12)
        pixels = math.prod(surrogate.shape)
        a = torch.randn(pixels, count, generator=generator).to(public.images) / count**0.5
        a.requires_grad_()
        b = public.images.mean(dim=0).flatten().requires_grad_()
        optimizer = torch.optim.Adam([*theta.values(), a, b], lr=self.lr)
        for step in watch.steps(self.steps, stretches=True, fewest=FEWEST):
            x, y, positive = draw(public, self.batches)
            g_plus = kept_entries(weighted_gradients(model, theta, x, y, positive), index)
            holds = positive.sum(dim=1) > 0  # batches without an image that passes have no g+
            loss = F.mse_loss(F.linear(scale * g_plus[holds], a, b), of_picked(x, positive)[holds])
            if self.negatives:
                alpha = self.negatives * schedule(step.progress, self.batch_size * self.summands())
                g_minus = kept_entries(weighted_gradients(model, theta, x, y, 1 - positive), index)
                others = F.linear(scale * g_minus, a).square().mean()  # r(g) - r(0) = A g
                loss = (loss + alpha * others) / (1 + alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Rounds of N held-out batches as they come; the image wanted is the extreme one of all.
        measured = self.measured(held)
        chosen = self.batches_of(measured, 32 * self.summands(), None, generator)
        x, y = held.images[chosen], held.labels[chosen]
        each = kept_entries(weighted_gradients(model, theta, x, y, x.new_ones(chosen.shape)), index)
        g = each.detach().unflatten(0, (32, self.summands())).sum(dim=1)
        extreme = self.scored(measured[chosen]).unflatten(0, (32, self.summands())).flatten(1)
        best = extreme.argmax(dim=1)
        truth = (
            x.unflatten(0, (32, self.summands())).flatten(1, 2).flatten(2)[torch.arange(32), best]
        )
        return {
            **{f"model/{name}": p.detach() for name, p in theta.items()},
            **{f"index/{name}": kept for name, kept in index.items()},
            "A": a.detach(),
            "b": b.detach(),
            "scale": scale,
            "public_psnr": decibels(F.linear(scale * g, a.detach(), b.detach()), truth),
            "null_psnr": decibels(b.detach().expand_as(truth), truth),
            **({} if threshold is None else {"threshold": torch.tensor(threshold)}),
        }

    def kept(self, numel: int) -> int:
        """How many of a tensor's entries are kept."""
        return min(numel, max(self.entries, math.ceil(self.share * numel)))

    def summands(self) -> int:
        """Over how many clients the gradient is a sum, N."""
        return max(self.clients, 1) if self.form == "thresh" else 1

    def measured(self, images: ImageSet) -> Tensor:
        """Brightness ``(S,)``, or its negative for ``dark``."""
        brightness = images.images.flatten(1).mean(dim=1)
        return brightness if self.property == "bright" else -brightness

    def scored(self, measured: Tensor) -> Tensor:
        """The property ``(K, B)``, for ``thresh`` in standard deviations of each batch."""
        return in_own_batch(measured) if self.form == "thresh" else measured

    def threshold(self, images: ImageSet, generator: torch.Generator) -> float:
        """tau, from 2,000 random public batches."""
        measured = self.measured(images)
        p = in_own_batch(measured[self.batches_of(measured, 2_000, None, generator)])
        return best_threshold(p, self.summands())

    def batches_of(
        self, measured: Tensor, count: int, threshold: float | None, generator: torch.Generator
    ) -> Tensor:
        """Indices ``(count, B)`` of random batches; with a threshold, half hold one that passes.

        Args:
            measured: ``(S,)`` of the images to choose from.
            count: K.
            threshold: tau, or None for batches as they come.
            generator: Randomness.
        """

        def some(number: int) -> Tensor:
            # Different images in a batch: the first B of a random order.
            return torch.stack(
                [torch.randperm(len(measured), generator=generator)[: self.batch_size]
                 for _ in range(number)]
            )  # fmt: skip

        if threshold is None:
            return some(count)
        kept: dict[int, list[Tensor]] = {0: [], 1: []}
        wanted = {0: count // 2, 1: count - count // 2}
        for _ in range(MOST_DRAWS):
            chosen = some(1)
            passing = int((in_own_batch(measured[chosen]) > threshold).sum())
            if passing in kept and len(kept[passing]) < wanted[passing]:
                kept[passing].append(chosen)
            if all(len(kept[kind]) == wanted[kind] for kind in kept):
                return torch.cat([*kept[1], *kept[0]])
        raise InvalidInput(
            f"SEER(form='thresh'): among {MOST_DRAWS} batches of {self.batch_size} of the "
            f"{len(measured)} public images, too few have none or one beyond the threshold "
            f"{threshold:.2f}; give more images."
        )

    def picked(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """Marks ``(K, B)`` the image of each batch ``(K, B, C, H, W)`` with the property.

        One in every batch; with a threshold, those that pass it.
        """
        brightness = x.flatten(2).mean(dim=2)
        extreme = brightness if self.property == "bright" else -brightness
        if threshold is not None:
            return (in_own_batch(extreme) > threshold).to(x)
        return F.one_hot(extreme.argmax(dim=1), x.shape[1]).to(x)

    # -- before and after the client trains ------------------------------------------------------

    def tamper(self, view: View, *, generator: torch.Generator, watch: Watch) -> Tampering | None:
        """The learned weights; one round is enough."""
        del generator
        if view.rounds:
            return None
        model = view.model
        trained = replace(
            self,
            batch_size=self.batch_size or view.num_examples,
            clients=(self.clients or len(view.clients)) if self.form == "thresh" else 0,
        )
        front = surgery.Normalise(view.box).to(view.surrogate.images.device)
        public = view.surrogate
        if public.labels.dim() == 1 and int(public.labels.max()) >= view.classes:
            public = replace(public, labels=public.labels % view.classes)
        learned = trained.artefact(public, nn.Sequential(front, model), watch=watch)
        key = {name: t for name, t in learned.items() if not name.startswith("model/")}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(learned[f"model/1.{name}"])
            # Running statistics that fit the weights, as after honest training.
            like = next(model.parameters())
            with in_mode(model, train=True), draws.averaged():
                for images in view.surrogate.images.split(256):
                    model(view.box.normalize(images.to(like)))
        return Tampering(sent=TamperedModel.of(model), key=key)

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """One linear map of the kept entries of the summed gradient."""
        del generator, watch
        key, update = view.key, view.update
        if update.kind == "gradient":
            gradient = update.gradient()
        else:
            protocol = view.protocol
            gradient = update.gradient(lr=protocol.lr, steps=protocol.steps(view.num_examples))
        like = next(iter(gradient.values()))
        summed = {f"1.{n}": g[None] * view.num_examples for n, g in gradient.items()}
        image = decoded(summed, key)
        shape = tuple(view.input_shape)
        gain = key["public_psnr"] - key["null_psnr"]
        return Reconstruction(
            images=view.box.normalize(image.clamp(0, 1).reshape(1, *shape)),
            confidence=gain.reshape(1).to(like),
            notes={
                name: float(key[name])
                for name in ("public_psnr", "null_psnr", "threshold")
                if name in key
            },
        )


def in_own_batch(measured: Tensor) -> Tensor:
    """Measurements ``(K, B)`` less their batch's mean, over its (biased) standard deviation."""
    centred = measured - measured.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()


def best_threshold(p: Tensor, clients: int) -> float:
    """tau: the largest ``(F2 - F1) F1^(N-1)`` over the values between observed ones.

    Args:
        p: ``(K, B)`` of batches, in their own standard deviations, B at least 2.
        clients: N.
    """
    top = p.double().topk(2, dim=1).values
    first, second = (top[:, i].sort().values for i in (0, 1))
    values = first.unique()
    candidates = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    f1, f2 = (
        torch.searchsorted(part, candidates, right=True).double() / len(part)
        for part in (first, second)
    )
    chance = (f2 - f1) * f1 ** (clients - 1)
    return float(candidates[int(chance.argmax())])


class BatchMoments(nn.Module):
    """Batch normalisation by the moments of the batch, in elementary operations.

    PyTorch's own has a second derivative that, behind a vmapped gradient, leaves out how mean and
    variance move: the gradient is right, but what is learned through it is not.

    Args:
        like: The layer that it stands for; weights are shared.
    """

    def __init__(self, like: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = like.weight, like.bias
        self.affine, self.eps = like.affine, like.eps

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, ...)`` to the same shape."""
        others = [d for d in range(x.dim()) if d != 1]
        centred = x - x.mean(dim=others, keepdim=True)
        y = centred * (centred.square().mean(dim=others, keepdim=True) + self.eps).rsqrt()
        if not self.affine:
            return y
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return y * self.weight.reshape(shape) + self.bias.reshape(shape)


def seeing_the_batch(model: nn.Module) -> nn.Module:
    """A float32 copy in train mode whose batch normalisations know their own batch only."""
    model = copy.deepcopy(model).float().train()
    for name, layer in batchnorm_layers(model).items():
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        model.set_submodule(name, BatchMoments(layer))
    return model


def weighted_gradients(
    model: nn.Module, theta: Mapping[str, Tensor], x: Tensor, y: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Gradients of the weighted sum of losses, a batch at a time, differentiable in ``theta``.

    Args:
        model: Without running statistics.
        theta: Its parameters.
        x: ``(K, B, C, H, W)``; every batch is normalised on its own.
        y: ``(K, B)``.
        weight: ``(K, B)`` of each example's loss.

    Returns:
        ``(K, *shape)`` for every parameter.
    """

    def loss(theta: Mapping[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        logits = functional_call(model, dict(theta), (x,))
        return (F.cross_entropy(logits, y, reduction="none") * weight).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0), randomness="different")
    with draws.averaged(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # Operations that vmap takes one by one are slower, and no less right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found: dict[str, Tensor] = each(dict(theta), x, y, weight)
    return found


def kept_entries(gradients: Mapping[str, Tensor], index: Mapping[str, Tensor]) -> Tensor:
    """The secret subset of a gradient ``(K, P)``, tensors in alphabetical order of their names."""
    return torch.cat([gradients[name].flatten(1)[:, index[name]] for name in sorted(index)], dim=1)


def decoded(summed: Mapping[str, Tensor], key: Mapping[str, Tensor]) -> Tensor:
    """``r(g)``, pixels in [0, 1] but for errors, ``(K, n)``.

    Args:
        summed: Gradients ``(K, *shape)`` of the sum over the batch, by name.
        key: What the server kept.
    """
    index = {n.removeprefix("index/"): t for n, t in key.items() if n.startswith("index/")}
    g = kept_entries(summed, index)
    # A copy lies aligned in memory; a view of a file may not, and sums would round differently.
    a = key["A"].to(g, copy=True)
    return F.linear(g * key["scale"].to(g), a, key["b"].to(g))


def schedule(progress: float, batch: int) -> float:
    """alpha: log2 goes from -2 to log2 of the batch size over half of the steps, then stays."""
    return math.pow(2.0, -2 + (math.log2(batch) + 2) * min(1.0, 2 * progress))


def of_picked(x: Tensor, positive: Tensor) -> Tensor:
    """The picked image of each batch, ``(K, n)``."""
    return torch.einsum("kb,kbn->kn", positive, x.flatten(2))


def decibels(found: Tensor, truth: Tensor) -> Tensor:
    """Mean PSNR of rows in [0, 1], clipped."""
    error = (found.clamp(0, 1) - truth).square().mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10().mean()
