r"""GGL: a gradient-free search of a generator's latent space, through an estimate of the defense.

Li, Zhang, Liu and Liu, "Auditing Privacy Defenses in Federated Learning via Generative Gradient
Leakage", CVPR 2022. FedSGD, one image; FedAVG by replaying the local steps.

With a generator G, the label read off the update (iDLG) and T-hat, the adversary's estimate of what
the client's defense does to an update,

.. math:: z^* = \arg\min_z \; \frac1L \sum_{l=1}^L \bigl\lVert \hat T(\nabla_\theta
          \mathcal L(G(z), \hat y))_l - g_l \bigr\rVert^2 + \lambda\,\mathrm{KL}(z), \qquad
          \mathrm{KL}(z) = -\tfrac12 \bigl(1 + \log \sigma_z^2 - \mu_z^2 - \sigma_z^2 \bigr),

L tensors, mu and sigma over the coordinates of z. CMA-ES looks for it: the losses of populations
are all it needs, and what defenses make of gradients leads no descent astray.

Of the defense only the kind must be known; its strength is read off the update:

- clipping: the bound is the norm of g; the trial is scaled down to it;
- pruning: the rate of a tensor is its share of zeros; of the trial as many entries stay, the
  largest;
- Soteria: the mask is the pattern of zeros in the first row of the head's gradient;
- noise: nothing; a trial with fresh noise would be further from g, not closer.

The result is close in meaning rather than in pixels, and never better than what G can draw.

Measured (studies ``generative`` and ``ggl``: one image, some 1,000 to 2,000 evaluations of the
published 25,000): above the nearest public image on fresh ConvNets and below it on trained ones and
on ResNet-18; GIFD, which follows gradients through the same prior, is far ahead of it. Knowing the
defense gains several decibels under clipping and Soteria, and nothing under pruning. Where the
update is noised, and on photos from a trained network, the update of other images gives about as
good a picture: the prior, not the update.

Departures:
    - CMA-ES is that of the library ``cma``, with full covariance; released code has it through
      nevergrad, where "budget" counts something else than its loop. TuRBO, its other choice, is
      left out; ``optimizer="adam"`` is its baseline, on the same loss.
    - The candidate of smallest distance without the KL term is kept, not the search's mean.
    - Rates of pruning are per tensor instead of one for all: the defense prunes each by itself.
    - The published priors are BigGAN (with ``squash``, from U[0, 1)) and a WGAN-GP; ours are small
      decoders, whose latents are standard normal as the WGAN's (see :mod:`leakatlas.priors`).
    - A batch is searched jointly, which the paper does not try.

Released code: ``zhuohangli/GGL``, ``reconstructor.py`` and ``defense.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.attacks.generative import prior as chosen
from leakatlas.blocks import descent, labels, latent, matching, observed
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnknownName, needing
from leakatlas.fl import View
from leakatlas.models.structure import example_input
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

Tensors = Mapping[str, Tensor]
Transform = Callable[[Tensors], dict[str, Tensor]]

KINDS = {"clipping": "clipping", "gradient_pruning": "pruning", "soteria": "soteria"}
"""Our defenses by the kinds of which the paper knows an adaptive form."""

VARIANCE_FLOOR = 1e-10


@attack("ggl", needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.SURROGATE)
@dataclass(frozen=True, kw_only=True)
class GGL(Attack):
    """CMA-ES over latents, each judged through the estimated defense.

    Args:
        rounds: Populations of a trial (500).
        population: Candidates of each (50).
        spread: Initial standard deviation of the search.
        kl_weight: Lambda of the KL term; 0 with ``squash``, which bounds the latents.
        squash: Whether latents go through tanh first, as for BigGAN.
        trials: Independent searches; the one of smallest distance counts.
        optimizer: ``cma``, or the paper's baseline ``adam`` (signed, ``population`` iterations for
            each round's worth of gradients would be too many: one for each round).
        lr: Step size of the baseline.
        adapt: Kinds of defenses that the trial update goes through: ``clipping``, ``pruning``,
            ``soteria``; those that the view says are in force if None, none if empty.
        prior: ``auto``, ``surrogate`` (learned on the surrogate images), the name of a shipped
            prior, or the folder of one.
        prior_steps: Steps of learning one.
        prior_latent: Length of the latent of one that is learned.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    counts = ("rounds",)
    replays = True
    draws_on_prior = True

    rounds: PositiveInt = 500
    population: PositiveInt = 50
    spread: Positive = 1.0
    kl_weight: NonNegative = 0.1
    squash: bool = False
    trials: PositiveInt = 1
    optimizer: Literal["cma", "adam"] = "cma"
    lr: Positive = 0.1
    adapt: tuple[str, ...] | None = None
    prior: str = chosen.AUTO
    prior_steps: PositiveInt = 1_000
    prior_latent: PositiveInt = 128
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for minutes: fewer, smaller populations, from closer to the mean image."""
        return cls(rounds=200, population=24, spread=0.5, kl_weight=0.01)

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """The published search, ours, and the descent that it was published against."""
        return {
            "tuned": cls.tuned(),
            "published": cls(),
            "descent": cls(optimizer="adam", rounds=2_500),
        }

    def priors(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        """The prior that is kept, if it takes one."""
        return chosen.named(self.prior, shape)

    def outlook(self, view: View) -> Outlook:
        """Whether there is a prior of images of the victims' shape, and how far it reaches."""
        return chosen.outlook(self.prior, view, leaves=False)

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Label, estimate of the defense, search."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; nothing can be matched")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        T_hat = self.defense(view, g)
        prior = chosen.prior_of(
            self.prior, view, steps=self.prior_steps, latent=self.prior_latent, watch=watch
        )
        decode, N = prior.decoder(y), view.num_examples
        images = latent.to_model_space(view.input_shape, view.box)
        replay = view.replayer(adaptive=False)

        def draw(z: Tensor) -> Tensor:
            return images(decode(z.tanh() if self.squash else z))

        def value(z: Tensor) -> descent.Value:
            D = sq_mean(T_hat(replay(draw(z), y)), g)
            return descent.Value(D + self.kl_weight * kl(z).mean(), D)

        best, loss, evaluations = None, math.inf, 0
        for part in watch.share(self.trials):
            start = prior.sample(N, generator=generator, like=like)
            if self.optimizer == "cma":
                found = self.evolve(value, start, generator, part)
            else:
                found = self.descend(value, start, part)
            evaluations += found.evaluations
            if found.loss < loss:
                best, loss = found.z, found.loss
        if best is None:
            return nothing_found(view.input_shape, "no objective was ever finite")
        with torch.no_grad():
            x_hat = draw(best)
        return Reconstruction(
            images=view.box.clip(x_hat),
            labels=y,
            confidence=torch.full((N,), -loss, dtype=torch.float64),
            notes={
                "matching_loss": loss,
                "evaluations": float(evaluations),
                "adapted": float(len(self.kinds(view))),
                **chosen.notes(prior),
            },
        )

    # -- the defense -----------------------------------------------------------------------------

    def kinds(self, view: View) -> tuple[str, ...]:
        """The defenses that trials go through."""
        if self.adapt is not None:
            known = tuple(KINDS.values())
            for kind in self.adapt:
                if kind not in known:
                    raise UnknownName("kind of defense that GGL adapts to", kind, known)
            return self.adapt
        if not view.has("defenses"):
            return ()
        return tuple(KINDS[d.key] for d in view.defenses if d.key in KINDS)

    def defense(self, view: View, g: Tensors) -> Transform:
        """T-hat, its strength estimated from ``g``."""
        makers: dict[str, Callable[[], Transform]] = {
            "clipping": lambda: clipping(g),
            "pruning": lambda: pruning(g),
            "soteria": lambda: soteria(g, head_of(view)),
        }
        steps = [makers[kind]() for kind in self.kinds(view)]

        def through(update: Tensors) -> dict[str, Tensor]:
            out = dict(update)
            for step in steps:
                out = step(out)
            return out

        return through

    # -- the search ------------------------------------------------------------------------------

    def evolve(
        self,
        value: Callable[[Tensor], descent.Value],
        start: Tensor,
        generator: torch.Generator,
        watch: Watch,
    ) -> Found:
        """CMA-ES from the mean latent."""
        best = Found(start, math.inf, 0)

        def judge(flat: Sequence[NDArray[np.float64]]) -> list[float]:
            nonlocal best
            losses = []
            for one in flat:
                z = torch.as_tensor(one).to(start).reshape(start.shape)
                total, D = (float(term.detach()) for term in value(z))
                losses.append(total if math.isfinite(total) else math.inf)
                best = best.or_better(z, D)
            return losses

        seed = 1 + int(torch.randint(2**31 - 2, (1,), generator=generator))
        evolve(
            judge, np.zeros(start.numel()), spread=self.spread, population=self.population,
            rounds=self.rounds, seed=seed, watch=watch,
        )  # fmt: skip
        return best

    def descend(
        self, value: Callable[[Tensor], descent.Value], start: Tensor, watch: Watch
    ) -> Found:
        """The baseline: signed Adam on the same loss."""
        found = descent.descend(
            lambda variables, t: value(variables["z"]),
            {"z": start},
            optimizer=descent.adam(self.lr),
            steps=self.rounds,
            transform=descent.signed,
            schedule=descent.step_decay((3 / 8, 5 / 8, 7 / 8)),
            watch=watch,
        )
        return Found(found.best["z"], float(found.criterion), found.steps)


@dataclass(frozen=True)
class Found:
    """The best latent so far.

    Args:
        z: The latent.
        loss: Its distance.
        evaluations: Latents that were judged.
    """

    z: Tensor
    loss: float
    evaluations: int

    def or_better(self, z: Tensor, loss: float) -> Found:
        """After one more."""
        count = self.evaluations + 1
        return Found(z, loss, count) if loss < self.loss else Found(self.z, self.loss, count)


def evolve(
    judge: Callable[[Sequence[NDArray[np.float64]]], list[float]],
    start: NDArray[np.float64],
    *,
    spread: float,
    population: int,
    rounds: int,
    seed: int,
    watch: Watch,
) -> None:
    """CMA-ES (Hansen, 2016): ask for a population, tell its losses.

    Args:
        judge: Losses of points.
        start: Initial mean.
        spread: Initial standard deviation.
        population: Points of a round; two at the least.
        rounds: Populations.
        seed: Positive.
        watch: Budget and progress.
    """
    with needing("GGL's search", "cma"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not import matplotlib")  # nothing is drawn
        import cma
    options = {"popsize": max(population, 2), "seed": seed, "verbose": -9, "tolx": 0, "tolfun": 0,
               "tolfunhist": 0, "tolstagnation": rounds + 1, "maxiter": rounds + 1}  # fmt: skip
    strategy = cma.CMAEvolutionStrategy(start, spread, options)
    for _ in watch.steps(rounds, stretches=True):
        points = strategy.ask()
        losses = judge(points)
        strategy.tell(points, losses)
        watch.note = f"loss {min(losses):.4g}"


# -- the objective -------------------------------------------------------------------------------


def sq_mean(a: Tensors, b: Tensors) -> Tensor:
    """Squared differences, summed within tensors and averaged over them."""
    return matching.squared_l2(a, b) / len(b)


def kl(z: Tensor) -> Tensor:
    """``(N,)``: divergence of the normal with the moments of z's coordinates from the standard."""
    flat = z.flatten(1)
    mean, variance = flat.mean(1), flat.var(1, correction=0)
    return -0.5 * (1 + (variance + VARIANCE_FLOOR).log() - mean.square() - variance)


# -- estimates of defenses -----------------------------------------------------------------------


def clipping(g: Tensors) -> Transform:
    """Scale a trial down to the norm of ``g``, if it is larger."""
    bound = total_norm(g)
    return lambda update: {
        n: t * (bound / total_norm(update)).clamp(max=1.0) for n, t in update.items()
    }


def total_norm(update: Tensors) -> Tensor:
    """Euclidean norm over all tensors."""
    return torch.stack([t.square().sum() for t in update.values()]).sum().sqrt()


def pruning(g: Tensors) -> Transform:
    """Of every tensor of a trial keep as many entries as ``g`` shows, the largest."""
    kept = {name: int((t != 0).sum()) for name, t in g.items()}

    def prune(update: Tensors) -> dict[str, Tensor]:
        out = {}
        for name, t in update.items():
            order = t.detach().abs().flatten().argsort(descending=True, stable=True)
            mask = torch.zeros(t.numel(), dtype=t.dtype, device=t.device)
            mask[order[: kept[name]]] = 1
            out[name] = t * mask.reshape(t.shape)
        return out

    return prune


def pruning_rate(g: Tensors) -> float:
    """The share of zeros in an update: what an observer takes the pruning rate for."""
    zeros = sum(int((t == 0).sum()) for t in g.values())
    return zeros / sum(t.numel() for t in g.values())


def soteria(g: Tensors, head: str) -> Transform:
    """Zero the columns of the head's gradient that are zero in the first row of the observed."""
    mask = (g[head][0] != 0).to(g[head])
    return lambda update: {**update, head: update[head] * mask}


def head_of(view: View) -> str:
    """Name of the last linear layer's weight."""
    return labels.find_head(view.model, example_input(view.model, view.input_shape)).weight_name
