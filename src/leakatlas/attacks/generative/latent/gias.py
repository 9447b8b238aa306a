r"""GIAS: search the latent space of a generator, then the weights of one generator per image.

Jeon, Kim, Lee, Oh and Ok, "Gradient Inversion with Generative Image Prior", NeurIPS 2021.
FedSGD, one round; FedAVG by replaying the local steps.

With :math:`D(x) = 1 - \cos(\nabla_\theta \mathcal L(x, y), g)`, norms over all tensors jointly,
and a generator G learned on public data of the same population, two searches follow each other:

.. math:: z^* = \arg\min_z \; D(G_w(z)) + \lambda\,\mathrm{TV}(G_w(z)), \qquad
          w_1^*, \dots, w_N^* = \arg\min_{w_1, \dots, w_N} \;
          D(x) + \lambda\,\mathrm{TV}(x), \quad x_i = G_{w_i}(z_i^*).

The first stays among the images that G can draw; the second leaves them, but starts at a
plausible image and moves in the directions that G's architecture makes easy. The steps:

1. R latent batches from N(0, I), Adam, step size falling tenfold at 3/8, 5/8 and 7/8.
2. The restart of smallest D gives z*, which is not touched again.
3. Every image gets its own copy of G's weights; Adam on all copies, with the same schedule.
4. The iterate of smallest D is returned.

The cosine sees no scale: an update that was clipped to a norm is matched as well as a free one.

Labels: the paper takes them as known; here ``Grant.LABELS`` gives them. Without it the sign rule
finds the label of a single example and the count identity at uniform class probabilities those of
a batch, which fits a network early in training.

Departures:
    - The published generators are StyleGAN2 (512 to 1024 pixels, pooled down) and a DCGAN. Ours
      is the decoder of a small variational autoencoder at 32 pixels: the shipped one, learned on
      a part of the CIFAR-10 training images (see its card), or one that :meth:`GIAS.prepare`
      learns on ``view.surrogate``. Weights of StyleGAN2 may not be redistributed.
    - Nothing random is left in step 3, so its R repetitions would be equal; it runs once.
    - The best iterate by D of either search is kept, not its last one.
    - The defaults are the row "ImageNet 32"; the released script's default row for ImageNet 64
      (7 and 6 steps) is a leftover and no setting of the paper.
    - The meta-learned variant, which needs many rounds instead of surrogate data, is not here.

Released code: ``ml-postech/gradient-inversion-generative-image-prior``,
``inversefed/reconstruction_algorithms.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakatlas import models
from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, matching, observed, priors
from leakatlas.blocks.watch import FEWEST, Watch
from leakatlas.data import Box, ImageSet
from leakatlas.errors import InvalidInput
from leakatlas.fl import View
from leakatlas.models import Generator
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

SHIPPED = "generator-cifar10"
SHIPPED_SHAPE = (3, 32, 32)
MILESTONES = (3 / 8, 5 / 8, 7 / 8)
COARSEST = 8
"""Sides of generated images are multiples of it: three doublings."""

Images = Callable[[Tensor], Tensor]
"""Pixels of [0, 1] at the generator's size to model space at the client's size."""


@attack("gias", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class GIAS(Attack):
    """Latent search, then generator search with one copy per image.

    Args:
        latent_steps: Iterations T1 of the latent search; 1,000 for ImageNet 128.
        generator_steps: Iterations T2 of the generator search; 8,000 for ImageNet 128. 0 leaves
            it out.
        latent_lr: Step size on z.
        generator_lr: Step size on the generators' weights.
        tv_weight: Lambda of the total variation, in model space.
        latent_weight: Weight of the mean squared latent; 1e-3 in the meta-learned variant.
        restarts: Latent batches R that are searched at once.
        top: Match only so many tensors of largest norm, as for ImageNet 128 (50); all if None.
        prior: The shipped generator, or one learned on the surrogate images.
        prior_epochs: Passes over the surrogate images when the generator is learned.
        prior_latent: Length of its latent.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    counts = ("latent_steps", "generator_steps")
    replays = True
    learned_by = ("prior_epochs", "prior_latent")

    latent_steps: PositiveInt = 500
    generator_steps: NonNegativeInt = 5_000
    latent_lr: Positive = 3e-2
    generator_lr: Positive = 1e-3
    tv_weight: NonNegative = 1e-6
    latent_weight: NonNegative = 0.0
    restarts: PositiveInt = 3
    top: PositiveInt | None = None
    prior: Literal["shipped", "surrogate"] = "shipped"
    prior_epochs: PositiveInt = 6
    prior_latent: PositiveInt = 128
    labels: tuple[NonNegativeInt, ...] = ()

    def prepare(
        self, surrogate: ImageSet, model: nn.Module, *, generator: torch.Generator, watch: Watch
    ) -> dict[str, Tensor]:
        """Weights of a generator learned on the surrogate images."""
        del model
        G = fresh_generator(surrogate.shape, self.prior_latent)
        learn(G, surrogate.images, epochs=self.prior_epochs, generator=generator, watch=watch)
        return {name: p.detach() for name, p in G.named_parameters()}

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Latent search, selection by D, generator search."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        G = self.generator(view, watch).to(like)
        images = to_model_space(view.input_shape, view.box)
        replay = view.replayer()
        distance: matching.Distance = matching.cosine
        if self.top is not None:
            distance = matching.subset(distance, matching.largest(g, self.top))

        def value(x: Tensor) -> descent.Value:
            D = distance(replay(x, y), g)
            return descent.Value(D + self.tv_weight * priors.tv_mean(x), D)

        shape = (self.restarts, view.num_examples, G.latent)
        parts = watch.share(2 if self.generator_steps else 1)
        latent = search_latent(
            G,
            init.normal(shape, generator=generator, like=like),
            lambda pixels: value(images(pixels)),
            steps=self.latent_steps,
            lr=self.latent_lr,
            weight=self.latent_weight,
            watch=next(parts),
        )
        z = latent.best["z"][int(latent.criterion.argmin())]
        x_hat, loss, iterations = images(G(z)), float(latent.criterion.min()), latent.steps
        for part in parts:
            tuned = search_generators(
                G,
                z,
                lambda pixels: value(images(pixels)),
                steps=self.generator_steps,
                lr=self.generator_lr,
                watch=part,
            )
            iterations += tuned.steps
            if float(tuned.criterion) <= loss:
                x_hat, loss = images(draw(G, tuned.best, z)), float(tuned.criterion)
        return Reconstruction(
            images=view.box.clip(x_hat.detach()),
            labels=y,
            confidence=torch.full((len(y),), -loss, dtype=torch.float64),
            notes={
                "latent_loss": float(latent.criterion.min()),
                "matching_loss": loss,
                "iterations": float(iterations),
                "halted_restarts": float((~latent.alive).sum()),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(latent.trouble)

    def generator(self, view: View, watch: Watch) -> Generator:
        """The prior, frozen and in eval mode."""
        if self.prior == "shipped":
            G = models.pretrained(SHIPPED)
            assert isinstance(G, Generator)
        else:
            learned = self.artefact(view.surrogate, view.model, watch=watch)
            G = fresh_generator(view.surrogate.shape, self.prior_latent)
            models.apply_state(G, learned, source="the learned generator")
        return G.eval().requires_grad_(False)

    def outlook(self, view: View) -> Outlook:
        """Whether the prior speaks of images of the victims' shape."""
        if self.prior == "shipped" and tuple(view.input_shape) != SHIPPED_SHAPE:
            return Outlook(
                "hopeless",
                f"the shipped generator makes images of {SHIPPED_SHAPE}, the model reads "
                f"{tuple(view.input_shape)}; prior='surrogate' trains another",
            )
        return Outlook("unknown", "as good as the generator knows the client's kind of images")

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for a minute instead of an hour; chosen on bundled surrogate photos."""
        return cls(latent_steps=150, generator_steps=350, latent_lr=0.1, tv_weight=1e-4, restarts=2)


# -- the two searches ----------------------------------------------------------------------------


def search_latent(
    G: Generator,
    start: Tensor,
    value: Callable[[Tensor], descent.Value],
    *,
    steps: int,
    lr: float,
    weight: float,
    watch: Watch,
) -> descent.Descended:
    """Steps 1 and 2: Adam on R latent batches, each with its own best.

    Args:
        G: The generator.
        start: ``(R, N, latent)``.
        value: Objective and D of pixels ``(N, C, H, W)``.
        steps: Iterations T1.
        lr: Step size.
        weight: Weight of the mean squared latent.
        watch: Budget and progress.
    """

    def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
        del t
        z = variables["z"]
        total, criterion = value(G(z))
        return descent.Value(total + weight * z.square().mean(), criterion)

    return descent.descend(
        objective,
        {"z": start},
        candidates=len(start),
        optimizer=descent.adam(lr),
        steps=steps,
        watch=watch,
        schedule=descent.step_decay(MILESTONES),
    )


def search_generators(
    G: Generator,
    z: Tensor,
    value: Callable[[Tensor], descent.Value],
    *,
    steps: int,
    lr: float,
    watch: Watch,
) -> descent.Descended:
    """Step 3: Adam on one copy of G's weights for each of the fixed latents.

    Args:
        G: Gives the architecture and the weights to start from; not changed.
        z: ``(N, latent)``; not changed.
        value: Objective and D of pixels ``(N, C, H, W)``.
        steps: Iterations T2.
        lr: Step size.
        watch: Budget and progress.
    """

    def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
        del t
        return value(draw(G, variables, z))

    return descent.descend(
        objective,
        copies(G, len(z)),
        optimizer=descent.adam(lr),
        steps=steps,
        watch=watch,
        schedule=descent.step_decay(MILESTONES),
    )


def copies(G: Generator, count: int) -> dict[str, Tensor]:
    """The weights of G by name, ``count`` times along a new first dimension."""
    return {n: p.detach().expand(count, *p.shape).clone() for n, p in G.named_parameters()}


def draw(G: Generator, weights: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Image i of latent i ``(N, latent)`` by the generator with the weights i of each stack."""
    return torch.cat(
        [
            functional_call(G, {n: stack[i] for n, stack in weights.items()}, (z[i : i + 1],))
            for i in range(len(z))
        ]
    )


# -- around them ---------------------------------------------------------------------------------


class _Fit(NamedTuple):
    channels: int
    height: int
    width: int


def to_model_space(shape: tuple[int, ...], box: Box) -> Images:
    """How generated pixels become inputs of the client's model.

    Larger images are averaged down, smaller ones interpolated; colours become grey by their mean
    where the client's images have one channel, and grey is repeated where they have several.

    Args:
        shape: ``(C, H, W)`` of the client's images.
        box: Their pixel space.

    Raises:
        InvalidInput: If ``shape`` is no image.
    """
    if len(shape) != 3:
        raise InvalidInput(f"GIAS draws images (C, H, W); the model takes inputs of shape {shape}.")
    fit = _Fit(*shape)

    def convert(pixels: Tensor) -> Tensor:
        if pixels.shape[1] != fit.channels:
            pixels = pixels.mean(1, keepdim=True).expand(-1, fit.channels, -1, -1)
        if pixels.shape[2:] != (fit.height, fit.width):
            smaller = fit.height <= pixels.shape[2] and fit.width <= pixels.shape[3]
            pixels = F.interpolate(
                pixels, size=(fit.height, fit.width), mode="area" if smaller else "bilinear"
            )
        return box.normalize(pixels)

    return convert


# -- a generator of one's own --------------------------------------------------------------------


class Encoder(nn.Module):
    """Mean and log variance of the latent, ``(N, latent)`` each, of images ``(N, C, S, S)``.

    Args:
        channels: Channels of an image.
        size: Its side S.
        latent: Length of the latent.
    """

    def __init__(self, *, channels: int, size: int, latent: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU()]
            channels = width
        side = size // COARSEST
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * side * side, 2 * latent)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance."""
        mean, log_variance = self.body(2 * x - 1).chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)


def fresh_generator(shape: tuple[int, int, int], latent: int) -> Generator:
    """An untrained generator of square images that cover ``shape`` = ``(C, H, W)``."""
    size = -(-max(shape[1:]) // COARSEST) * COARSEST
    return Generator(latent=latent, channels=shape[0], size=size)


def learn(
    G: Generator,
    images: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    watch: Watch,
    batch: int = 128,
    lr: float = 3e-3,
    kl_weight: float = 3.0,
) -> None:
    """Train ``G`` as the decoder of a variational autoencoder, in place.

    The recipe of the shipped generator: Gaussian likelihood at its optimal variance (Rybkin et
    al., 2021), Adam under a one-cycle schedule, horizontal flips.

    Args:
        G: The decoder.
        images: ``(M, C, H, W)`` in [0, 1].
        epochs: Passes over them.
        generator: Order, flips and latent noise; the encoder's weights come from the global one.
        watch: Budget and progress.
        batch: Images in a step.
        lr: Peak step size.
        kl_weight: Weight of the divergence from the standard normal.
    """
    if images.shape[2:] != (G.size, G.size):
        images = F.interpolate(images, size=(G.size, G.size), mode="bilinear", antialias=True)
    encoder = Encoder(channels=G.channels, size=G.size, latent=G.latent)
    parameters = [*encoder.parameters(), *G.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    batch = min(batch, len(images))
    per_epoch = len(images) // batch
    order = torch.empty(0, dtype=torch.int64)
    for step in watch.steps(epochs * per_epoch, stretches=True, fewest=FEWEST):
        for group in optimizer.param_groups:
            group["lr"] = lr * one_cycle(step.progress)
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator)[: per_epoch * batch]
        x, order = images[order[:batch]], order[batch:]
        flip = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x.flip(3), x)
        mean, log_variance = encoder(x)
        noise = torch.randn(mean.shape, generator=generator)
        x_hat = G(mean + noise * (0.5 * log_variance).exp())
        optimizer.zero_grad(set_to_none=True)
        loss = likelihood(x, x_hat) + kl_weight * divergence(mean, log_variance)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1_000.0)
        optimizer.step()


def one_cycle(progress: float, *, rise: float = 0.3) -> float:
    """Factor on the step size: half a cosine up from 1/25, then half a cosine down to 0."""
    if progress < rise:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * progress / rise))
    return 0.5 * (1 + math.cos(math.pi * (progress - rise) / (1 - rise)))


def likelihood(x: Tensor, x_hat: Tensor) -> Tensor:
    """Negative Gaussian log likelihood per image at the optimal variance, up to a constant."""
    return 0.5 * math.prod(x.shape[1:]) * (x - x_hat).square().mean().log()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from the standard normal, in nats per image."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
