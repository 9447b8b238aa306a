r"""GGDM: the sampling of a diffusion model, guided by the distance between gradients.

Gu et al., "Federated Learning Vulnerabilities: Privacy Attacks with Denoising Diffusion
Probabilistic Models", WWW 2024. FedSGD; FedAVG by replaying the local steps.

A pretrained, unconditional diffusion model draws an image from noise in T steps. Every step is
corrected towards images whose gradient is like the observed one,

.. math:: \hat x_0 = \frac{x_t - \sqrt{1 - \bar\alpha_t}\, \epsilon_\phi(x_t, t)}
          {\sqrt{\bar\alpha_t}}, \qquad
          d_t = \nabla_{x_t} D\bigl(\nabla_\theta \mathcal L(\Pi \hat x_0, y), g\bigr), \qquad
          x_{t-1} = x'_{t-1} - s_t \frac{d_t}{\lVert d_t \rVert},

with x' the unguided step and Pi from [-1, 1] to the model's inputs. Nothing is learned for the
attack. What comes out looks like the images of the prior; where the update is noised beyond use,
it is one of them.

Reconstructed: only the abstract could be read. The formulas are posterior guidance as it is
usually done (Chung et al., 2023); step sizes are ours, :math:`s_t = 0.1\, \kappa \sqrt{\dim}
\sqrt{1 - \bar\alpha_t}`.

Measured (study ``generative``, with the exact denoiser of 1,000 public images, about as many CPU
seconds as [3]): on fresh ConvNets it ends one to three decibels below the nearest public image,
which is all that this denoiser can draw, and, of images of the population, above what other images'
updates give; on trained ones, on photos, on digits and on a ResNet-18 those give about as good a
picture: the prior, not the update. On another machine means of three images were up to two decibels
higher or lower. A diffusion model draws more: with the shipped one (study ``shipped_priors``) it
reaches on fresh ConvNets what GIAS does there, far above what other images' updates give; on a
trained one it averages about as much as the nearest public image.

Departures:
    - Sampling is respaced to fewer steps (DDIM with eta = 1, which is DDPM's noise).
    - ``wrt="xt"`` evaluates the distance at x_t itself, without a pass through the denoiser. It
      guides through smooth networks alone: with the exact denoiser of 24 images it finds eight of
      eight victims through sigmoids and next to none through ReLUs. That is theory: a ReLU's slope
      leaves out how its mask moves with x, and many of the masks that noise sets are not the
      image's. Softplus loses the direction as its kink sharpens; ReLUs that kept the image's own
      masks would have it. The estimate :math:`\hat x_0`, the default, is near images at all times,
      and so are its masks.
    - The prior is a small denoiser: the shipped one, one learned on the surrogate images, or, with
      ``prior="images"``, the exact denoiser of the surrogate images, which gives back one of them.
    - Of several samples the one of smallest distance is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.attacks.generative import prior as chosen
from leakatlas.blocks import init, latent, matching, observed
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import Fraction, NonNegative, NonNegativeInt, PositiveInt
from leakatlas.priors import Diffusion
from leakatlas.threat import Knowledge

UNIT = 0.1
"""Length of a correction at kappa = 1, per root of the dimension and of the noise."""

Guide = Callable[[Tensor], Tensor]
"""``x (N, C, H, W)`` in [-1, 1] to the distance between gradients."""


@attack("ggdm", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class GGDM(Attack):
    """Guided reverse diffusion.

    Args:
        steps: Steps of sampling, out of the model's own T.
        guidance: Kappa; 0 samples without looking at the update.
        wrt: Where the distance is differentiated: through the denoiser at its estimate of the
            image (``x0``), or at the noisy image itself (``xt``).
        distance: ``norm`` of the difference, its square, or the cosine distance.
        eta: Share of DDPM's noise in every step; 0 is deterministic.
        samples: Independent samples; the one of smallest distance counts.
        prior: ``auto``, ``surrogate`` (learned), ``images`` (the surrogate images themselves), the
            name of a shipped diffusion model, or the folder of one. ``auto`` is the shipped
            ``ddpm32-s``, of CIFAR-10 images, for every client of 3x32x32 images, whatever they or
            the surrogate images show; for other shapes one is learned.
        prior_steps: Steps of learning one.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    replays = True
    draws_on_prior = True

    steps: PositiveInt = 250
    guidance: NonNegative = 1.0
    wrt: Literal["x0", "xt"] = "x0"
    distance: Literal["norm", "squared", "cosine"] = "norm"
    eta: Fraction = 1.0
    samples: PositiveInt = 4
    prior: str = chosen.AUTO
    prior_steps: PositiveInt = 2_000
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Fewer steps, fewer samples."""
        return cls(steps=120, samples=2)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, the default, and stronger guidance."""
        return {"tuned": cls.tuned(), "published": cls(), "strong": cls(guidance=3.0)}

    def priors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The prior that is kept, if it takes one."""
        return chosen.named_diffusion(self.prior, shape)

    def outlook(self, view: View) -> Outlook:
        """Whether there is a diffusion model, or images to learn one from."""
        if len(view.input_shape) != 3:
            return Outlook("hopeless", f"it samples images, not inputs of {view.input_shape}")
        if kept := self.priors(tuple(view.input_shape)):
            return Outlook(
                "unknown", f"as good as the diffusion model {kept[0]} knows the client's images"
            )
        if not view.has("surrogate"):
            return Outlook("hopeless", "no diffusion model of this shape, and no surrogate images")
        return Outlook("unknown", f"a diffusion model of {len(view.surrogate)} surrogate images")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Guided samples, and the closest of them."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; nothing guides")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        prior = chosen.diffusion_of(self.prior, view, steps=self.prior_steps, watch=watch)
        images, replay = latent.to_model_space(view.input_shape, view.box), view.replayer()
        measure = {
            "norm": lambda a, b: matching.squared_l2(a, b).clamp_min(1e-30).sqrt(),
            "squared": matching.squared_l2,
            "cosine": matching.cosine,
        }[self.distance]

        def apart(x: Tensor) -> Tensor:
            return measure(replay(images((x + 1) / 2), y), g)

        best, loss, steps = None, math.inf, 0
        shape = (view.num_examples, *prior.shape)
        for part in watch.share(self.samples):
            start = init.normal(shape, generator=generator, like=like)
            x, made = self.sample(prior, start, apart, generator, part)
            steps += made
            distance = float(apart(x).detach())
            if distance < loss:
                best, loss = x, distance
        if best is None:
            return nothing_found(view.input_shape, "no sample had a finite distance")
        return Reconstruction(
            images=view.box.clip(images((best + 1) / 2)),
            labels=y,
            confidence=torch.full((len(y),), -loss, dtype=torch.float64),
            notes={"matching_loss": loss, "iterations": float(steps)},
        )

    def sample(
        self, prior: Diffusion, x: Tensor, D: Guide, generator: torch.Generator, watch: Watch
    ) -> tuple[Tensor, int]:
        """An image in [-1, 1] from noise, and the steps that it took.

        Args:
            prior: The diffusion model.
            x: Noise ``(N, C, H, W)``.
            D: The distance that guides.
            generator: Of the noise of every step.
            watch: Budget and progress; a step goes to where the schedule is by then.
        """
        T, made = len(prior.kept), 0
        now = T - 1
        for step in watch.steps(self.steps, stretches=True):
            if step.index == 0:
                continue
            then = max(round((T - 1) * (1 - step.progress)), 0)
            if then < now:
                x = self.step(prior, x, now, then, D, generator)
                now, made = then, made + 1
        return self.step(prior, x, now, -1, D, generator), made + 1

    def step(
        self,
        prior: Diffusion,
        x: Tensor,
        t: int,
        then: int,
        D: Guide,
        generator: torch.Generator,
    ) -> Tensor:
        """From time ``t`` to ``then``; -1 is the image itself."""
        kept = float(prior.kept[t])
        kept_then = float(prior.kept[then]) if then >= 0 else 1.0
        guided = self.guidance > 0
        with torch.enable_grad():
            x = x.detach().requires_grad_(guided)
            noise = prior.noise(x, t)
            clean = (x - math.sqrt(1 - kept) * noise) / math.sqrt(kept)
            if guided:
                (d,) = torch.autograd.grad(D(clean if self.wrt == "x0" else x), x)
        x, noise = x.detach(), noise.detach()
        clean = clean.detach().clamp(-1, 1)
        sigma = self.eta * math.sqrt((1 - kept_then) / (1 - kept) * (1 - kept / kept_then))
        fresh = init.normal(tuple(x.shape), generator=generator, like=x)
        x = math.sqrt(kept_then) * clean + sigma * fresh
        x = x + math.sqrt(max(1 - kept_then - sigma**2, 0.0)) * noise
        if guided and then >= 0:
            length = UNIT * self.guidance * math.sqrt(x.numel() * (1 - kept))
            x = x - length * d / d.norm().clamp_min(1e-30)
        return x
