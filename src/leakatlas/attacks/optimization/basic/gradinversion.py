r"""GradInversion: gradient matching with BN statistics and agreement between several searches.

Yin, Mallya, Vahdat, Alvarez, Kautz and Molchanov, "See through Gradients: Image Batch Recovery
via GradInversion", CVPR 2021.   FedSGD, one round, a batch of distinct labels.

G searches start from independent noise. Search g minimises

.. math:: \alpha_G \sum_l \lVert \nabla_l(\hat x_g) - g_l \rVert_2
          + \alpha_{tv} \mathrm{TV}(\hat x_g) + \alpha_{\ell_2} \lVert \hat x_g \rVert_2
          + \alpha_{BN} R_{BN}(\hat x_g)
          + \alpha_{group} \lVert \hat x_g - \bar x \rVert_2 , \tag{1, 9-12}

where :math:`\bar x` is what the searches agree on: their pixel mean ("lazy"), or the mean after
each search was aligned to that mean. After every Adam step, Gaussian noise of standard deviation
:math:`\lambda(t)\,\alpha_n` is added to the pixels (Langevin). Labels are the N classes whose row
of the head's gradient has the smallest minimum: with non-negative features, only examples of class
c pull row c below zero.

The BN target is either that of the private batch, as synchronised BN would reveal it
(``bn="exact"``, an explicit grant), or the model's running statistics (``bn="running"``, which
every recipient of the model holds).

Departures:
    - No official code exists; constants not printed in the paper's main text follow its readers.
    - Alignment uses integer translations found by phase correlation, where the paper trains an
      optical-flow network (RANSAC-Flow) on public images. A convolutional network is nearly blind
      to shifts, so shifts are what searches mostly disagree on.
    - ``steps`` keeps the published 20,000; the start and the refresh of the alignment keep their
      published share of the run (a quarter) and count (100).
    - Of each search the iterate of smallest objective is kept, and the search whose iterate is
      smallest, or the consensus of all, is returned.
    - Labels are taken from ``Grant.LABELS`` where the scenario gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import batchnorm, descent, init, labels, matching, priors
from leakatlas.blocks.observed import known_labels, mean_gradient
from leakatlas.blocks.watch import Step, Watch
from leakatlas.fl import View
from leakatlas.fl.losses import PLAIN
from leakatlas.models.structure import example_input, has_batchnorm
from leakatlas.params import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Grant, Knowledge


@attack("gradinversion", needs=Knowledge.UPDATES)
@dataclass(frozen=True, kw_only=True)
class GradInversion(Attack):
    """Adam with noise on G coupled searches.

    Args:
        steps: Iterations.
        lr: Peak step size lambda, in model space.
        warmup: Iterations of linear rise; a cosine falls to 0 after it.
        seeds: Coupled searches G.
        match_weight: Alpha_G.
        tv_weight: Alpha_tv, on the four-direction TV of the whole batch.
        l2_weight: Alpha_l2.
        bn_weight: Alpha_BN; 0 leaves the term out and needs no BN.
        group_weight: Alpha_group.
        noise: Alpha_n.
        bn: Whose statistics are matched: the private batch's ("exact", needs
            ``Grant.BATCH_BN``) or the model's running ones.
        bn_first: Factor on the first BN layer; 10 in descendants of DeepInversion.
        consensus: "lazy" pixel mean, or "registered" by translation.
        register_from: Share of the run after which "registered" aligns; the plain mean before.
        refresh: Iterations between two alignments.
        answer: Whether the best search or the consensus is returned.
    """

    replays = True

    steps: PositiveInt = 20_000
    lr: Positive = 0.1
    warmup: NonNegativeInt = 50
    seeds: PositiveInt = 8
    match_weight: NonNegative = 1e-3
    tv_weight: NonNegative = 1e-4
    l2_weight: NonNegative = 1e-6
    bn_weight: NonNegative = 0.1
    group_weight: NonNegative = 0.01
    noise: NonNegative = 0.2
    bn: Literal["exact", "running"] = "exact"
    bn_first: NonNegative = 1.0
    consensus: Literal["lazy", "registered"] = "registered"
    register_from: Fraction = 0.25
    refresh: PositiveInt = 100
    answer: Literal["best", "consensus"] = "best"

    departs_from_letter = (
        "The table prints E for the statistics of the private batch; here those are the explicit "
        "grant batch_bn, and the rest of the method reads the update alone."
    )

    def grants(self) -> frozenset[Grant]:
        """The batch's own BN statistics, where they are matched."""
        exact = self.bn == "exact" and self.bn_weight > 0
        return frozenset({Grant.BATCH_BN}) if exact else frozenset()

    @classmethod
    def tuned(cls) -> Self:
        """Ours for short budgets: two searches and the model's running statistics, no grant."""
        return cls(steps=400, warmup=20, seeds=2, bn="running", consensus="lazy")

    def outlook(self, view: View) -> Outlook:
        """Whether there is batch normalisation to match, and room for distinct labels."""
        if not view.has("labels") and view.num_examples > view.classes:
            return Outlook(
                "hopeless",
                f"{view.num_examples} examples cannot have distinct labels among "
                f"{view.classes} classes",
            )
        if self.bn_weight > 0 and not has_batchnorm(view.model):
            return Outlook("hopeless", "the model has no batch normalisation to match")
        return Outlook("unknown", "batch statistics guide it where the gradient alone does not")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Labels, then the coupled searches, then the choice among them."""
        g = view.update.tensors
        N, G = view.num_examples, self.seeds
        like = next(iter(g.values()))
        if view.has("labels"):
            y = view.labels
        elif N > view.classes:
            return nothing_found(
                view.input_shape,
                f"{N} examples cannot have distinct labels among {view.classes} classes",
            )
        elif view.loss != PLAIN:
            y = known_labels(view)
        else:
            head = labels.find_head(view.model, example_input(view.model, view.input_shape))
            y = labels.column_min(mean_gradient(view), head, N)
        replay = view.replayer()
        bn_prior = self._bn_prior(view)
        agreed = Consensus(self)

        def objective(variables: descent.Variables, t: Tensor) -> Tensor:
            del t
            x, x_bar = variables["x"], variables["x_bar"]
            return (
                self.match_weight * matching.layerwise_l2(replay(x, y), g)
                + self.tv_weight * priors.tv_four(x)
                + self.l2_weight * priors.l2_norm(x)
                + self.bn_weight * bn_prior(x)
                + self.group_weight * matching.norm(x - x_bar)
            )

        start = init.normal((G, *view.batch_shape), generator=generator, like=like)
        end = descent.descend(
            objective,
            {"x": start},
            candidates=G,
            shared=lambda searches, step: {"x_bar": agreed(searches["x"], step)},
            optimizer=descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=descent.cosine_decay(warmup=min(self.warmup / self.steps, 0.5)),
            after=(descent.langevin(self.noise, "x", generator=generator),),
            generators=(generator,),
        )
        chosen = int(end.criterion.argmin())
        loss = float(end.criterion[chosen])
        searches = end.best["x"]
        x_hat = searches[chosen]
        if self.answer == "consensus":
            x_hat = agreed.of(searches)
        spread = matching.norm(searches - searches.mean(0), (1, 2, 3, 4)).mean()
        return Reconstruction(
            images=x_hat,
            labels=y,
            confidence=torch.full((N,), -loss, dtype=torch.float64),
            notes={
                "objective": loss,
                "matching_loss": float(matching.layerwise_l2(replay(x_hat, y), g).detach()),
                "spread_of_searches": float(spread),
                "iterations": float(end.steps),
                "halted_searches": float((~end.alive).sum()),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(end.trouble)

    def _bn_prior(self, view: View) -> Callable[[Tensor], Tensor]:
        if self.bn_weight == 0:
            return lambda x: x.new_zeros(())
        model = view.model
        target: batchnorm.Statistics
        target = view.batch_bn if self.bn == "exact" else batchnorm.running_statistics(model)
        return batchnorm.prior(model, target, first_weight=self.bn_first)


class Consensus:
    """What the searches agree on, kept between refreshes.

    Args:
        settings: The attack's parameters.
    """

    def __init__(self, settings: GradInversion) -> None:
        self.settings = settings
        self.aligned: Tensor | None = None

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """The consensus ``(N, C, H, W)`` of searches ``(G, N, C, H, W)`` at this step."""
        if self.settings.consensus == "lazy" or step.progress < self.settings.register_from:
            return x.mean(0)
        if self.aligned is None or step.index % self.settings.refresh == 0:
            self.aligned = registered_mean(x)
        return self.aligned

    def of(self, x: Tensor) -> Tensor:
        """The consensus of finished searches."""
        return x.mean(0) if self.settings.consensus == "lazy" else registered_mean(x)


def registered_mean(x: Tensor) -> Tensor:
    """Mean over searches after each image is moved onto the plain mean, ``(N, C, H, W)``.

    Args:
        x: ``(G, N, C, H, W)``.
    """
    mean = x.mean(0)
    return torch.stack([shifted(x_g, shift_to(x_g, mean)) for x_g in x]).mean(0)


def shift_to(x: Tensor, reference: Tensor) -> Tensor:
    """The circular shift that carries each image of ``x`` onto ``reference``.

    The peak of the phase correlation, summed over channels [Kuglin and Hines, 1975].

    Args:
        x: ``(N, C, H, W)``.
        reference: ``(N, C, H, W)``.

    Returns:
        ``(N, 2)`` int64: rows down, columns to the right.
    """
    cross = torch.fft.rfft2(reference) * torch.fft.rfft2(x).conj()
    phase = cross / cross.abs().clamp(min=torch.finfo(x.dtype).tiny)
    width = x.shape[-1]
    response = torch.fft.irfft2(phase, s=x.shape[-2:]).sum(1)
    peak = response.flatten(1).argmax(1)
    return torch.stack([peak // width, peak % width], dim=1)


def shifted(x: Tensor, shift: Tensor) -> Tensor:
    """Each image of ``x`` ``(N, C, H, W)`` rolled by its row of ``shift`` ``(N, 2)``."""
    N, _, H, W = x.shape
    rows = (torch.arange(H, device=x.device) - shift[:, :1]) % H  # (N, H)
    columns = (torch.arange(W, device=x.device) - shift[:, 1:]) % W  # (N, W)
    number = torch.arange(N, device=x.device).view(N, 1, 1)
    moved = x.permute(0, 2, 3, 1)[number, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.permute(0, 3, 1, 2)
