r"""GIFD: a search that descends through the stages of a generator, inside balls around each.

Fang, Chen, Wang, Wang and Xia, "GIFD: A Generative Gradient Inversion Method with Feature Domain
Optimization", ICCV 2023. FedSGD; FedAVG by replaying the local steps.

With a generator in stages, :math:`G = S_K \circ \dots \circ S_1`, and :math:`G_k` the stages after
the k-th, the latent is searched first, and then the output of one stage after the other, each from
where the one before ended:

.. math:: z^* = \arg\min_z \; J(G(z)), \qquad
          h_k^* = \arg\min_{\lVert h - h_k^0 \rVert_1 \le r_k} J(G_k(h)), \quad
          h_k^0 = S_k(h_{k-1}^*),

.. math:: J(x) = 1 - \cos(\nabla_\theta \mathcal L(x, y), g) + \lambda_{TV}\,\mathrm{TV}(x)
          + \lambda_2 \lVert x \rVert_2 / S^2 .

Later stages can draw more than the generator was taught; the balls keep them near what it means.
Of all stages, the iterate of smallest cosine distance is returned.

1. R latents from N(0, I), Adam; after every step back onto the sphere of the start's norm.
2. Adam on :math:`h_k`, its state fresh in every stage; after every step onto the l1 ball, each
   image by itself.
3. The step size rises over the first 5 % of a stage and falls as a cosine over its last 75 %.

A known defense's mirror is part of the replay.

Measured (studies ``generative`` and ``ggl``: one image, about as many CPU seconds as [3]): the
strongest of the rows that draw on a learned prior, level with a rehearsed [3] on fresh ConvNets and
ahead of it on photos that neither the prior nor the rehearsal knows; on trained ones it is behind
by several decibels without BN, and no more than three images can tell from it with BN; on grey
images it is behind. The update of other images gives nothing of it, but for a fresh ResNet-18,
where the picture is the prior's; on a trained one, too, it ends no closer than the mean image, near
which [3] ends as well. Knowing the defense helps under pruning and decides under Soteria; the
cosine makes up for clipping by itself.

Departures:
    - Radii are shares of the l1 norm of a stage's start, growing with the stage as the published
      ones do: those, 1,000 to 8,000, belong to the feature sizes of BigGAN and StyleGAN2.
    - The best latent of the R alone goes on to the features.
    - Released code returns the last restart instead of the best, drops StyleGAN2's skip between
      stages, and orders recovered labels by the true ones; none of it here.
    - What a stage takes beside the feature is carried along as the stages before left it: labels
      and latent of BigGAN, styles, noise and the image so far of StyleGAN2. The paper moves styles
      and noise with the feature; here a stage of their own moves the styles, one for each
      convolution, before the features, and the noise stays.
    - The published priors may not be redistributed; ours are small decoders (see
      :mod:`leakatlas.priors`). A user's own BigGAN or StyleGAN2 is opened just so.

Released code: ``ffhibnese/GIFD_Gradient_Inversion_Attack``,
``inversefed/reconstruction_algorithms.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.attacks.generative import prior as chosen
from leakatlas.blocks import descent, latent, matching, observed, priors
from leakatlas.blocks.watch import Step, Watch
from leakatlas.errors import InvalidInput
from leakatlas.fl import View
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt, PositiveOrInf
from leakatlas.priors.prior import Part, through
from leakatlas.threat import Knowledge

RISE, FALL = 0.05, 0.75
"""Shares of a stage in which the step size rises and falls."""


@attack("gifd", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class GIFD(Attack):
    """Latent search, then feature searches from stage to stage.

    Args:
        steps: Iterations of a stage (1,000).
        lr: Step size in every stage.
        tv_weight: Of the total variation, in model space.
        norm_weight: Of the norm of the batch over the pixels of an image.
        radius: Radius of the first feature stage's ball, as a share of the l1 norm of where the
            stage starts; infinite for no ball.
        growth: By how much of it the radius grows from stage to stage.
        restarts: Latents R that are searched at once.
        stages: Feature stages that are searched, from the first; all if None, 0 for none.
        adaptive: Whether the trial update goes through the mirrors of the defenses in force.
        prior: ``auto``, ``surrogate`` (learned on the surrogate images), the name of a shipped
            prior, or the folder of one.
        prior_steps: Steps of learning one.
        prior_latent: Length of the latent of one that is learned.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    replays = True
    draws_on_prior = True

    steps: PositiveInt = 1_000
    lr: Positive = 0.1
    tv_weight: NonNegative = 1e-4
    norm_weight: NonNegative = 1e-6
    radius: PositiveOrInf = 0.5
    growth: NonNegative = 0.5
    restarts: PositiveInt = 4
    stages: NonNegativeInt | None = None
    adaptive: bool = True
    prior: str = chosen.AUTO
    prior_steps: PositiveInt = 1_000
    prior_latent: PositiveInt = 128
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for a minute."""
        return cls(steps=120, restarts=2)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, the published, and one without balls."""
        return {"tuned": cls.tuned(), "published": cls(), "no balls": cls(radius=math.inf)}

    def priors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The prior that is kept, if it takes one."""
        return chosen.named(self.prior, shape)

    def outlook(self, view: View) -> Outlook:
        """Whether there is a prior of images of the victims' shape, and how far it reaches."""
        return chosen.outlook(self.prior, view, leaves=self.stages != 0)

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """The latent, then one stage after the other."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        prior = chosen.prior_of(
            self.prior, view, steps=self.prior_steps, latent=self.prior_latent, watch=watch
        )
        if not prior.stages:
            raise InvalidInput(
                f"GIFD opens a generator stage by stage; the prior {prior.card.name!r} has none. "
                "Take one that leakatlas prior train made, a BigGAN, a StyleGAN2 or a stack of "
                "layers."
            )
        images = latent.to_model_space(view.input_shape, view.box)
        replay = view.replayer(adaptive=self.adaptive)
        pixels = math.prod(view.input_shape[1:])

        def value(x: Tensor) -> descent.Value:
            D = matching.cosine(replay(x, y), g)
            prior_term = self.tv_weight * priors.tv_mean(x) + self.norm_weight * x.norm() / pixels
            return descent.Value(D + prior_term, D)

        def drawing(rest: Sequence[Part], *beside: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda h: images(through(rest, h, *beside))

        count = len(prior.stages) - 1
        inner = count if self.stages is None else min(self.stages, count)
        parts = watch.share(1 + inner)
        start = prior.sample(self.restarts, view.num_examples, generator=generator, like=like)
        found = latent.search_latent(
            prior.decoder(y), start, lambda p: value(images(p)), steps=self.steps, lr=self.lr,
            schedule=ramp, watch=next(parts), after=(on_sphere(start),),
        )  # fmt: skip
        if found.trouble:
            return nothing_found(view.input_shape, found.trouble)
        losses, steps = [float(found.criterion.min())], found.steps
        state = prior.inputs(found.best["z"][int(found.criterion.argmin())], y)
        x_hat = images(through(prior.stages, *state))
        for k, part in zip(range(1, inner + 1), parts, strict=False):
            with torch.no_grad():
                h, *beside = prior.stages[k - 1](*state)
            radii = self.radius * (1 + self.growth * (k - 1)) * h.flatten(1).abs().sum(1)
            draw = drawing(prior.stages[k:], *beside)
            tuned = descent.descend(
                of_features(draw, value),
                {"h": h},
                optimizer=descent.adam(self.lr),
                steps=self.steps,
                schedule=ramp,
                watch=part,
                after=(in_ball(h, radii),),
            )
            steps += tuned.steps
            h = tuned.best["h"]
            state = (h, *beside)
            losses.append(float(tuned.criterion))
            if losses[-1] <= min(losses):
                x_hat = draw(h)
        return Reconstruction(
            images=view.box.clip(x_hat.detach()),
            labels=y,
            confidence=torch.full((len(y),), -min(losses), dtype=torch.float64),
            notes={
                **{f"stage_{k}_loss": loss for k, loss in enumerate(losses)},
                "matching_loss": min(losses),
                "iterations": float(steps),
                **chosen.notes(prior),
            },
        )


def of_features(
    draw: Callable[[Tensor], Tensor], value: Callable[[Tensor], descent.Value]
) -> descent.Objective:
    """The objective of features ``h``."""
    return lambda variables, t: value(draw(variables["h"]))


def ramp(t: float) -> float:
    """Factor on the step size: 0 at the start, 1 after 5 % and half a cosine down at the end."""
    return 0.5 * (1 - math.cos(math.pi * min(1.0, (1 - t) / FALL))) * min(1.0, t / RISE)


def on_sphere(start: Tensor) -> descent.Hook:
    """Projection of latents ``(R, N, ...)`` onto the norms that they started with."""
    norms = start.flatten(2).norm(dim=2)

    def project(variables: descent.Variables, rates: Mapping[str, float], step: Step) -> None:
        del rates, step
        z = variables["z"]
        now = z.flatten(2).norm(dim=2).clamp_min(1e-12)
        z.mul_((norms / now).reshape(*norms.shape, *[1] * (z.dim() - 2)))

    return project


def in_ball(center: Tensor, radii: Tensor) -> descent.Hook:
    """Projection of features ``(N, ...)`` onto l1 balls of ``radii`` ``(N,)`` around a center."""

    def project(variables: descent.Variables, rates: Mapping[str, float], step: Step) -> None:
        del rates, step
        h = variables["h"]
        h.copy_(center + project_l1((h - center).flatten(1), radii).reshape(h.shape))

    return project


def project_l1(v: Tensor, radii: Tensor) -> Tensor:
    """The nearest points ``(N, D)`` of l1 balls of ``radii`` ``(N,)`` (Duchi et al., 2008)."""
    size = v.abs()
    ordered = size.sort(1, descending=True).values
    radii = radii.to(v)[:, None]
    excess = ordered.cumsum(1) - torch.where(torch.isfinite(radii), radii, torch.zeros_like(radii))
    places = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)
    last = (ordered * places > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0)
    inside = size.sum(1, keepdim=True) <= radii
    shrunk = v.sign() * (size - threshold).clamp_min(0)
    return torch.where(inside, v, shrunk)
