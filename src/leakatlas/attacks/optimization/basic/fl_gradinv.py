r"""FL-GradInv: solve batch statistics from a client's buffers, and match them and the update.

Hatamizadeh, Yin, Molchanov, Myronenko, Li, Dogra, Feng, Flores, Kautz, Xu and Roth, "Do Gradient
Inversion Attacks Make Federated Learning Unsafe?", IEEE Transactions on Medical Imaging 2023.
FedAVG, one round.

1. *Statistics of the client.* Batch normalisation moves its running statistics r by
   :math:`r \leftarrow (1 - m) r + m s` in every local step, so that after k steps

   .. math:: \bar s = \frac{r_k - (1 - m)^k r_0}{1 - (1 - m)^k}

   is the mean of the steps' batch statistics, later steps weighing more. The counter of batches
   beside them tells k. (Running variances take the unbiased form, which is turned into the biased
   one with the number of values that the layer saw in a batch.)
2. *Search.* From one image of the domain in every place (or noise), and free targets t,

.. math:: \alpha_g \sum_l \lVert \hat\Delta_l(x, \sigma(t)) - \Delta_l \rVert_2
          + \alpha_{BN} R_{BN}(x; \bar s) + \alpha_{tv} \mathrm{TV}(x)
          + \alpha_{\ell_2} \operatorname{mean}_i \lVert x_i \rVert_2

with the client's local training unrolled, by Adam along a cosine after a warm-up, pixel noise of
standard deviation :math:`\alpha_n \cdot` lr after every step.

The released code minimises something else. Its simulated update is read from the state after an
in-place step and so is *detached*: the matching term has no gradient in x. What is left is the
inversion of batch statistics, under priors; ``match="bn"`` is that, ``"update+bn"`` the method.
It also applies the one-step formula for every k (a value of 0.15 becomes 3.66 after five steps),
lets the weights drift over the run, and adds its pixel noise to a temporary.

Measured (study ``fl_gradinv``): of one image, buffers and update together give clearly more than
either alone, and more than the published [3]; of four at once a little more than either, and less
than a rehearsed [3]; of four one by one the update's replay takes away from what the statistics
give. Of lone digits (study ``frontier``), under defenses that stopped [3] there (CENSOR, SPN,
PRECODE, signs, 99 % pruned), seven in eight came out of fresh networks, a quarter to half without
the mean image, and five to eight in eight of trained ones; nothing where clients train on other
images than their own (DigestNN, ATS, DCS-2) or lock the normalisation (FedKL).

Departures:
    - The k-step formula. R_BN compares the same weighted mean over the local batches of the
      candidates, in their order, and over the clients of a mean; the release treats all images as
      one batch.
    - R_BN is evaluated at the received weights if k = 1, where it is exact, and at the updated ones
      otherwise, as the release does (``statistics_at``).
    - The domain's image is the mean image that the adversary knows of the population; the
      published one is a chest X-ray from elsewhere.
    - Granted labels take the place of free targets.
    - The iterate of smallest objective is kept, not the last one.
    - :meth:`FLGradInv.tuned` is ours: terms relative to the update, softmax targets under a loss
      of one class, and a box. Its settings were chosen on other images than any figure.

Released code: ``NVlabs/DeepInversion``, ``FLGradientInversion/fl_gradient_inversion.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import batchnorm, buffers, descent, init, labels, matching, priors
from leakatlas.blocks.buffers import Solved
from leakatlas.blocks.watch import Watch
from leakatlas.errors import UnsupportedModel
from leakatlas.fl import FedAVG, View, batchnorm_statistics
from leakatlas.models.structure import (
    has_batchnorm,
)
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge, Vantage


@attack(
    "fl_gradinv",
    needs=Knowledge.UPDATES | Knowledge.BASIC | Knowledge.TRAINING | Knowledge.DISTRIBUTION,
)
@dataclass(frozen=True, kw_only=True)
class FLGradInv(Attack):
    r"""Matching of an unrolled update and of the batch statistics that its buffers give away.

    Args:
        steps: Iterations.
        lr: Step size of Adam (decay rates 0.9 and 0.9), on images and targets.
        match: What is matched: update and statistics, or statistics alone, as released.
        match_weight: :math:`\alpha_g`.
        relative: Divide the matching term by the sum of the norms of the update's tensors, so that
            its weight has no unit.
        bn_weight: :math:`\alpha_{BN}`.
        statistics_at: Weights at which R_BN is evaluated; "auto" is described above.
        tv_weight: :math:`\alpha_{tv}`.
        l2_weight: :math:`\alpha_{\ell_2}`.
        noise: :math:`\alpha_n`.
        warmup: Iterations of linear rise of the step size, at most half of them all.
        start: The population's mean image, or noise.
        grey: One channel is sought and shown to all input channels, as for X-rays.
        targets: Squashing of the free targets: the paper's sigmoid, or the one that fits the
            client's loss.
        boxed: Whether every step ends inside the pixel box.
    """

    version: ClassVar[int] = 2

    steps: PositiveInt = 40_000
    lr: Positive = 0.1
    match: Literal["update+bn", "bn"] = "update+bn"
    match_weight: NonNegative = 1e-3
    relative: bool = False
    bn_weight: NonNegative = 0.1
    statistics_at: Literal["auto", "received", "updated"] = "auto"
    tv_weight: NonNegative = 1e-4
    l2_weight: NonNegative = 1e-5
    noise: NonNegative = 0.1
    warmup: NonNegativeInt = 100
    start: Literal["mean", "noise"] = "mean"
    grey: bool = False
    targets: Literal["sigmoid", "loss"] = "sigmoid"
    boxed: bool = False

    @classmethod
    def tuned(cls) -> Self:
        """Our setting for some hundred iterations on small images."""
        return cls(
            steps=600, lr=0.3, match_weight=1.0, relative=True, bn_weight=0.1, tv_weight=3e-3,
            noise=0.01, warmup=10, targets="loss", boxed=True,
        )  # fmt: skip

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """Ours, the published objective, and what the released code amounts to.

        Ours twice: of small grey digits the statistics say most, of photographs the update does.
        """
        return {
            "tuned": cls.tuned(),
            "statistics first": replace(cls.tuned(), bn_weight=1.0),
            "published": cls(),
            "released": cls(match="bn"),
        }

    def knowledge(self) -> Knowledge:
        """Noise needs no image of the domain, and without a box pixels have no range."""
        needed = Knowledge.UPDATES | Knowledge.TRAINING
        needed |= Knowledge.DISTRIBUTION if self.start == "mean" else Knowledge(0)
        return needed | (Knowledge.BASIC if self.boxed else Knowledge(0))

    def outlook(self, view: View) -> Outlook:
        """Statistics need layers that keep them and a client that sends them."""
        if not has_batchnorm(view.model):
            return Outlook("hopeless", "the model has no batch normalisation to read statistics of")
        if not view.rounds:
            return Outlook("unknown", "buffers before and after give the client's statistics")
        try:
            solved = statistics(view)
        except UnsupportedModel as problem:
            return Outlook("hopeless", str(problem))
        if solved.steps == 1:
            return Outlook("applicable", "one local step: the buffers give its exact statistics")
        return Outlook("unknown", f"the buffers mix the statistics of {solved.steps} local steps")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Statistics, then the search."""
        update = view.update
        g = dict(update.tensors)
        like = next(iter(g.values()))
        try:
            solved = statistics(view)
        except UnsupportedModel as problem:
            return nothing_found(view.input_shape, str(problem))
        bn_prior = self.bn_prior(view, solved)
        replay = view.replayer()
        y = view.labels if view.has("labels") else None
        size = sum(float(t.norm()) for t in g.values()) if self.relative else 1.0
        if size == 0:
            return nothing_found(view.input_shape, "the update is zero; there is nothing to match")
        C = view.input_shape[0]

        def objective(variables: descent.Variables, t: Tensor) -> Tensor:
            del t
            x = variables["x"].expand(-1, C, -1, -1)
            total = self.tv_weight * priors.tv_four(x) + self.l2_weight * priors.l2_norm(x)
            if self.bn_weight:
                total = total + self.bn_weight * bn_prior(x)
            if self.match == "update+bn":
                target = self.squashed(variables["t"], view) if y is None else y
                distance = matching.layerwise_l2(replay(x, target), g) / size
                total = total + self.match_weight * distance
            return total

        start = {"x": self.first(view, generator, like)}
        if y is None:
            shape = (view.num_examples, view.classes)
            start["t"] = init.uniform(shape, generator=generator, like=like)
        after = [descent.langevin(self.noise, "x", generator=generator)]
        if self.boxed:
            after.append(descent.inside(view.box, "x"))
        found = descent.descend(
            objective,
            start,
            optimizer=descent.adam(self.lr, betas=(0.9, 0.9)),
            steps=self.steps,
            watch=watch,
            schedule=descent.cosine_decay(warmup=min(self.warmup / self.steps, 0.5)),
            after=after,
            generators=(generator,),
        )
        x_hat = found.best["x"].expand(-1, C, -1, -1).contiguous()
        loss = float(found.criterion)
        return Reconstruction(
            images=x_hat,
            labels=found.best["t"].argmax(1) if y is None else y,
            confidence=torch.full((len(x_hat),), -loss, dtype=torch.float64),
            notes={
                "objective": loss,
                "bn_distance": float(bn_prior(x_hat)),
                "local_steps": float(solved.steps),
                "iterations": float(found.steps),
                "labels_granted": float(y is not None),
            },
        ).or_failed(found.trouble)

    def first(self, view: View, generator: torch.Generator, like: Tensor) -> Tensor:
        """Where the search starts, ``(N, C or 1, H, W)``."""
        shape = list(view.batch_shape)
        if self.grey:
            shape[1] = 1
        if self.start == "noise":
            return init.normal(tuple(shape), generator=generator, like=like)
        mean = view.distribution.mean.to(like)
        mean = mean.mean(0, keepdim=True) if self.grey else mean
        return mean.expand(*shape).clone()

    def squashed(self, t: Tensor, view: View) -> Tensor:
        """Targets ``(N, K)`` from the free variables."""
        return t.sigmoid() if self.targets == "sigmoid" else labels.soft_targets(view.loss, t)

    def bn_prior(self, view: View, solved: Solved) -> Callable[[Tensor], Tensor]:
        """R_BN of a candidate batch, which is split as every client splits its own."""
        batch, clients = local_batch(view), members(view)
        model = view.model.train()
        state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        late = self.statistics_at == "updated" or (
            self.statistics_at == "auto" and solved.steps > 1
        )
        if late and view.update.kind != "gradient":
            moved = view.update.as_delta(state).quantity()
            state |= {n: state[n] + t for n, t in moved.items()}

        def penalty(x: Tensor) -> Tensor:
            parts = x.split(batch)
            own = buffers.step_weights(solved, len(parts) // clients)
            weights = [weight / clients for _ in range(clients) for weight in own]
            mixed: dict[str, tuple[Tensor, Tensor]] = {}
            for part, weight in zip(parts, weights, strict=True):
                for name, (mean, variance) in batchnorm_statistics(model, state, part).items():
                    before = mixed.get(name, (0.0, 0.0))
                    mixed[name] = (before[0] + weight * mean, before[1] + weight * variance)
            return batchnorm.distance(mixed, solved.statistics)

        return penalty


def statistics(view: View) -> Solved:
    """What the buffers of the update give away.

    Raises:
        UnsupportedModel: As :func:`~leakatlas.blocks.buffers.client_statistics`.
    """
    steps = view.protocol.steps(view.num_examples // members(view))
    return buffers.client_statistics(
        view.update, view.model, view.input_shape, local_batch(view), steps
    )


def members(view: View) -> int:
    """Clients whose mean the update is, with equal shares of the examples."""
    cohort = view.rounds[-1].cohort
    summed = view.vantage in (Vantage.AGGREGATE, Vantage.PEER)
    return cohort if summed and view.num_examples % cohort == 0 else 1


def local_batch(view: View) -> int:
    """Examples of a client's local batch."""
    protocol = view.protocol
    N = view.num_examples // members(view)
    return min(N, protocol.batch_size) if isinstance(protocol, FedAVG) else N
