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

**Without a generator search** (``average``, ours): on a trained network many pictures of the prior
can match an update better than the prior's own best picture of the truth does, so that the smallest
D says little. Latents that start near the prior's mean and are pulled towards it find R different
ones of these. The squared error of their mean picture is at most the mean of theirs, by convexity.
Rehearsal may choose it (:meth:`GIAS.variants`).

The cosine sees no scale: an update that was clipped to a norm is matched as well as a free one.

**Meta-learned** (``prior="meta"``): no public image is needed, but many rounds of the same
population. A generator that is shared by all rounds starts untrained; every round is attacked with
it as above, which gives weights :math:`w_i` for each image, and then moves towards them (Reptile):
an Adam step on :math:`\sum_i \lVert w - w_i \rVert^2`. The last round is attacked with what was
learned.

Labels: the paper takes them as known; here ``Grant.LABELS`` gives them. Without it the sign rule
finds the label of a single example and the count identity at uniform class probabilities those of
a batch, which fits a network early in training.

Measured (study ``generative``: one image, every row about as many CPU seconds as [3], which stops
both searches early): behind a rehearsed [3] on every network, inside the prior's population and
outside. On fresh ConvNets it reaches somewhat more than the best picture that the prior itself can
draw, and than the published [3]; on trained ones it stays far below that picture, and below the
published [3] or level with it. On a ResNet-18, fresh or trained, it ends near the mean image, at
most a decibel above what other images' updates give; no row came above the nearest public image
there in this time but [3], on photos from a fresh one. Given a few times as long (study ``gias``,
label not granted) it leaves its prior behind on fresh ConvNets: the generator search adds several
decibels to what the latents reach, and four images at once come out nearly as well as one. On a
trained one it then ends well above the nearest public image; other images' updates end far below
that. With a prior that minutes taught on 2,000 images of 64 pixels (study ``own_population``), on a
trained ResNet-8, the search for the smallest D ends below [3], and below the mean image. The mean
picture of its restarts ends above the published [3]. It ends above a rehearsed [3], the mean image
and what another image's update gives as well, each by less than eight images can tell from nothing:
how much of it is the update's is not shown. With a prior of portraits, on a ResNet-8 trained on
portraits, both end well above [3], and next to no higher than from the update of another person:
the prior again. On a smaller network a narrow population helps: with a prior of other persons
(study ``faces_unseen``) it ends far above [3] in our preset on a trained ConvNet, which had less
CPU time, and level with it on a fresh one.

Departures:
    - The published generators are StyleGAN2 (512 to 1024 pixels, pooled down) and a DCGAN. Ours
      is the decoder of a small variational autoencoder: the shipped one, learned on a part of the
      CIFAR-10 training images (see its card), one that is learned on ``view.surrogate``, or a
      user's own. Weights of StyleGAN2 may not be redistributed.
    - Nothing random is left in step 3, so its R repetitions would be equal; it runs once.
    - The best iterate by D of either search is kept, not its last one.
    - The defaults are the row "ImageNet 32"; the released script's default row for ImageNet 64
      (7 and 6 steps) is a leftover and no setting of the paper.
    - ``average``, ``spread`` and the variant ``mean`` are ours.
    - In the meta-learned variant the model of the received states is used as it was in every round;
      released code makes steps of its own between them.

Released code: ``ml-postech/gradient-inversion-generative-image-prior``,
``inversefed/reconstruction_algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.attacks.generative import prior as chosen
from leakatlas.blocks import descent, latent, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.errors import InvalidParameter
from leakatlas.fl import View
from leakatlas.models import Generator
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.priors import Prior
from leakatlas.priors.lesson import drawn_shape, widths
from leakatlas.threat import Knowledge

MILESTONES = (3 / 8, 5 / 8, 7 / 8)
META = "meta"
"""The prior that is learned from the rounds themselves."""


@dataclass(frozen=True)
class Met:
    """One round, attacked.

    Args:
        found: What came out.
        weights: The generators' weights by name, one image after the other along a new first
            dimension; empty without a generator search.
    """

    found: Reconstruction
    weights: Mapping[str, Tensor]


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
        spread: Standard deviation of the latents that a search starts from, where the prior has 1.
        restarts: Latent batches R that are searched at once.
        average: Return the mean picture of all restarts instead of the one of smallest D; only
            without a generator search, which would start from one latent.
        top: Match only so many tensors of largest norm, as for ImageNet 128 (50); all if None.
        prior: ``auto``, ``surrogate`` (learned on the surrogate images), the name of a shipped
            prior, the folder of one, or ``meta`` (learned from the rounds themselves).
        meta_lr: Step size of the shared generator from round to round, with ``meta``.
        prior_steps: Steps of learning one.
        prior_latent: Length of the latent of one that is learned.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    counts = ("latent_steps", "generator_steps")
    replays = True
    draws_on_prior = True

    latent_steps: PositiveInt = 500
    generator_steps: NonNegativeInt = 5_000
    latent_lr: Positive = 3e-2
    generator_lr: Positive = 1e-3
    tv_weight: NonNegative = 1e-6
    latent_weight: NonNegative = 0.0
    spread: Positive = 1.0
    restarts: PositiveInt = 3
    average: bool = False
    top: PositiveInt | None = None
    prior: str = chosen.AUTO
    prior_steps: PositiveInt = 1_000
    prior_latent: PositiveInt = 128
    meta_lr: Positive = 1e-2
    labels: tuple[NonNegativeInt, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.average and self.generator_steps:
            raise InvalidParameter(
                f"GIAS(average=True, generator_steps={self.generator_steps}): a generator search "
                "starts from one latent and has no mean picture of several; set generator_steps=0, "
                "or average=False."
            )

    def knowledge(self) -> Knowledge:
        """Without public images where the rounds themselves teach the prior."""
        if self.prior == META:
            return Knowledge.UPDATES | Knowledge.BASIC
        return self.needs

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The prior, and the attack on the last round with it."""
        if not any(bool(tensor.any()) for tensor in view.update.tensors.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        if self.prior == META:
            prior = self.fresh_prior(view)
            parts = watch.share(len(view.rounds))
            optimizer = torch.optim.Adam(prior.network.parameters(), lr=self.meta_lr)
            for number in range(len(view.rounds) - 1):
                met = self.attack_round(view, number, prior, generator, next(parts, watch))
                if met.weights:
                    reptile(prior.network, met.weights, optimizer)
            last = next(parts, watch)
        else:
            prior = chosen.prior_of(
                self.prior, view, steps=self.prior_steps, latent=self.prior_latent, watch=watch
            )
            last = watch
        return self.attack_round(view, -1, prior, generator, last).found

    def fresh_prior(self, view: View) -> Prior:
        """An untrained generator of the client's images, whose weights do not depend on the run."""
        like = next(iter(view.update.tensors.values()))
        channels, size, _ = drawn_shape(view.input_shape)
        network = Generator(
            latent=self.prior_latent, channels=channels, size=size, widths=widths(size)
        )
        return chosen.untrained(network).at(like)

    def attack_round(
        self, view: View, number: int, prior: Prior, generator: torch.Generator, watch: Watch
    ) -> Met:
        """Latent search, selection by D, generator search, on the update of one round."""
        g = dict(view.update_at(number).tensors)
        like = next(iter(g.values()))
        y = self.labels_of(view, number)
        decode = prior.decoder(y)
        images = latent.to_model_space(view.input_shape, view.box)
        replay = view.replayer(round=number)
        distance: matching.Distance = matching.cosine
        if self.top is not None:
            distance = matching.subset(distance, matching.largest(g, self.top))

        def value(x: Tensor) -> descent.Value:
            D = distance(replay(x, y), g)
            return descent.Value(D + self.tv_weight * priors.tv_mean(x), D)

        start = prior.sample(self.restarts, view.num_examples, generator=generator, like=like)
        start = self.spread * start
        parts = watch.share(2 if self.generator_steps else 1)
        found = latent.search_latent(
            decode,
            start,
            lambda pixels: value(images(pixels)),
            steps=self.latent_steps,
            lr=self.latent_lr,
            weight=self.latent_weight,
            schedule=descent.step_decay(MILESTONES),
            watch=next(parts),
        )
        z = found.best["z"][int(found.criterion.argmin())]
        weights: dict[str, Tensor] = {}
        x_hat, loss, iterations = images(decode(z)), float(found.criterion.min()), found.steps
        if self.average:
            x_hat = images(torch.stack([decode(one) for one in found.best["z"]]).mean(0))
            loss = float(value(x_hat).criterion.detach())
        for part in parts:
            tuned = latent.search_weights(
                prior.network,
                prior.inputs(z, y),
                lambda pixels: value(images(pixels)),
                steps=self.generator_steps,
                lr=self.generator_lr,
                schedule=descent.step_decay(MILESTONES),
                watch=part,
            )
            iterations, weights = iterations + tuned.steps, tuned.best
            if float(tuned.criterion) <= loss:
                drawn = latent.drawn(prior.network, tuned.best, prior.inputs(z, y))
                x_hat, loss = images(drawn), float(tuned.criterion)
        claim = Reconstruction(
            images=view.box.clip(x_hat.detach()),
            labels=y,
            confidence=torch.full((len(y),), -loss, dtype=torch.float64),
            notes={
                "latent_loss": float(found.criterion.min()),
                "matching_loss": loss,
                "iterations": float(iterations),
                "halted_restarts": float((~found.alive).sum()),
                "labels_granted": float(view.has("labels")),
                **chosen.notes(prior),
            },
        ).or_failed(found.trouble)
        return Met(claim, weights)

    def labels_of(self, view: View, number: int) -> Tensor:
        """The labels of the last round as granted or read; of an earlier one, by the same rules."""
        rounds = view.rounds
        if number in (-1, len(rounds) - 1):
            return observed.known_labels(view, self.labels)
        seen = view.with_rounds(rounds[: number + 1], {})
        return observed.known_labels(seen.without("labels"))

    def priors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The prior that is kept, if it takes one."""
        return () if self.prior == META else chosen.named(self.prior, shape)

    def outlook(self, view: View) -> Outlook:
        """Whether there is a prior of images of the victims' shape, and how far it reaches."""
        if self.prior == META:
            count = len(view.rounds)
            return Outlook("unknown", f"{count} rounds teach its prior; the paper has hundreds")
        return chosen.outlook(self.prior, view, leaves=self.generator_steps > 0)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, the published, and the mean picture of several."""
        return {"tuned": cls.tuned(), "published": cls(), "mean": cls.mean()}

    @classmethod
    def mean(cls) -> Self:
        """The mean picture of four searches near the prior's mean.

        Chosen on public images, at one trained ResNet-8; on fresh networks it was not tried.
        """
        return cls(
            latent_steps=150, generator_steps=0, latent_lr=0.1, tv_weight=1e-4, latent_weight=0.3,
            spread=0.1, restarts=4, average=True,
        )  # fmt: skip

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for a minute instead of an hour; chosen on bundled surrogate photos."""
        return cls(latent_steps=150, generator_steps=350, latent_lr=0.1, tv_weight=1e-4, restarts=2)


def reptile(
    network: nn.Module, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """One step of a network's weights towards those of several copies, in place.

    Args:
        network: Whose parameters the optimizer moves.
        weights: Of the copies, ``(N, ...)`` by name.
        optimizer: Steps along the slope of the summed squared distances.
    """
    for name, p in network.named_parameters():
        p.grad = 2 * (p.detach() - weights[name]).sum(0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
