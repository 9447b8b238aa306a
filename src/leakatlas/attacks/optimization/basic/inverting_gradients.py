r"""Inverting Gradients: match the direction of the update, by signed Adam, with total variation.

Geiping, Bauermeister, Dröge and Moeller, "Inverting Gradients: How easy is it to break privacy in
federated learning?", NeurIPS 2020.   FedSGD, and FedAVG by replaying the local steps.

.. math:: \hat x = \arg\min_{x \in [0,1]^n} \;
          1 - \frac{\langle \nabla_\theta \mathcal L(x, y),\, g \rangle}
                   {\lVert \nabla_\theta \mathcal L(x, y) \rVert \, \lVert g \rVert}
          + \alpha \, \mathrm{TV}(x) \tag{4}

The norms run over all tensors jointly. Adam follows the *sign* of the gradient of the whole
objective, every step ends with a projection onto valid pixels, and the step size falls tenfold at
3/8, 5/8 and 7/8 of the run. Of several restarts the one of smallest matching loss, without the
prior, is kept. For FedAVG the same cosine compares weight deltas, the client's local steps being
unrolled (their order is taken as given by the candidates unless the scenario grants it).

Labels: the paper takes them as known; here ``Grant.LABELS`` gives them. Without it the bias rule
of iDLG finds the label of a single example, and for N > 1 the exact count identity at uniform
class probabilities finds how often each class occurs (weight deltas are first turned into mean
gradients), which fits a network early in training.

Departures:
    - ``steps`` and ``tv_weight`` follow the released library's defaults (4,800; 1e-1). The
      paper's settings differ per experiment and are listed under ``Args``.
    - With unknown labels the released code optimises one label vector that all examples share;
      counts are recovered instead.
    - The released FedAVG code ranks restarts without the client's batch size, hence under another
      client; here one replay serves optimisation and ranking.
    - The iterate of smallest matching loss within a restart is returned, not the last one.
    - :meth:`InvertingGradients.tuned` is ours: plain signed steps that shrink along a cosine, the
      relative L2 distance and a small TV weight, which grows with the number of examples. Its
      settings were chosen on other images than those of the published figures.

Released code: ``JonasGeiping/invertinggradients``,
``inversefed/reconstruction_algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from leakatlas.attacks.api import Attack, Outlook, Reconstruction, attack, nothing_found
from leakatlas.blocks import descent, init, matching, observed, priors
from leakatlas.blocks.watch import Watch
from leakatlas.fl import View
from leakatlas.params import NonNegative, NonNegativeInt, Positive, PositiveInt
from leakatlas.threat import Knowledge

DISTANCES: dict[str, matching.Distance] = {
    "cosine": matching.cosine,
    "relative_l2": matching.relative_l2,
    "squared_l2": matching.squared_l2,
}


@attack("inverting_gradients", needs=Knowledge.UPDATES | Knowledge.BASIC)
@dataclass(frozen=True, kw_only=True)
class InvertingGradients(Attack):
    r"""Signed descent on the cosine distance with a total-variation prior.

    Args:
        steps: Iterations. 4,000 for one CIFAR-10 image, 24,000 for ImageNet and for batches.
        lr: Step size in model space; 1 for 8 images after 5 local steps.
        tv_weight: Alpha of Eq. 4. 1e-4 on the released command line, 1e-6 for one CIFAR-10
            image, 1e-2 for 100 CIFAR-100 images, 1e-1 for trained ImageNet networks.
        tv_per_example: Multiply alpha by N: the more images share a gradient, the less it says of
            each and the more the prior must say.
        restarts: Independent starts; 8 for batches and trained ImageNet networks.
        distance: How updates are compared; the paper's is the cosine.
        optimizer: "adam" on the signed gradient (the paper's), "unsigned" for Adam on the gradient
            itself, or plain signed steps ("sign").
        schedule: "steps" (the paper's tenfold falls) or "cosine".
        top: Match only so many tensors of largest norm, as for untrained ImageNet networks (10);
            all if None.
        labels: Labels that were read from this update beforehand, where none are granted; the
            attack's own rule if empty.
    """

    version: ClassVar[int] = 2
    replays = True

    steps: PositiveInt = 4_800
    lr: Positive = 0.1
    tv_weight: NonNegative = 1e-1
    tv_per_example: bool = False
    restarts: PositiveInt = 1
    distance: Literal["cosine", "relative_l2", "squared_l2"] = "cosine"
    optimizer: Literal["adam", "unsigned", "sign"] = "adam"
    schedule: Literal["steps", "cosine"] = "steps"
    top: PositiveInt | None = None
    labels: tuple[NonNegativeInt, ...] = ()

    @classmethod
    def cifar(cls, *, steps: int = 4_000, restarts: int = 1) -> Self:
        """The paper's setting for single CIFAR-10 images."""
        return cls(steps=steps, tv_weight=1e-6, restarts=restarts)

    @classmethod
    def tuned(cls, *, steps: int = 400, restarts: int = 1) -> Self:
        """Our setting for a few hundred iterations on small images and smooth optimisation."""
        return cls(
            steps=steps,
            lr=0.3,
            tv_weight=3e-3,
            tv_per_example=True,
            restarts=restarts,
            distance="relative_l2",
            optimizer="sign",
            schedule="cosine",
        )

    @classmethod
    def variants(cls) -> Mapping[str, Self]:
        """What suits fresh and trained networks, with and without normalisation, and attention.

        Chosen on training images of six networks. The most promising come first: after our preset,
        Adam on the gradient itself along a cosine, with a prior from weak to strong.
        """
        adam = cls(optimizer="unsigned", schedule="cosine", steps=400, lr=0.3)
        return {
            "tuned": cls.tuned(),
            "adam, tv 0.1": replace(adam, tv_weight=0.1),
            "adam, tv 0.03": replace(adam, tv_weight=0.03),
            "adam, tv 0.3": replace(adam, tv_weight=0.3),
            "published": cls(),
            "signed adam, tv 0.03": replace(adam, lr=0.1, tv_weight=0.03, optimizer="adam"),
            "adam, tv 1": replace(adam, tv_weight=1.0),
            "adam, tv 0.003": replace(adam, tv_weight=0.003),
            "adam, l2, tv 0.1": replace(adam, lr=0.1, tv_weight=0.1, distance="relative_l2"),
        }

    def outlook(self, view: View) -> Outlook:
        """What stands against one image, and against several."""
        if view.rounds and view.update.kind == "delta":
            return Outlook("unknown", "the local steps are unrolled; drift makes it harder")
        if view.num_examples == 1:
            return Outlook("applicable", "one image and one gradient: the setting of the paper")
        return Outlook("unknown", f"{view.num_examples} images share one gradient")

    def run(self, view: View, *, generator: torch.Generator, watch: Watch) -> Reconstruction:
        """Restarts of signed descent, ranked by the matching loss alone."""
        g = dict(view.update.tensors)
        if not any(bool(tensor.any()) for tensor in g.values()):
            return nothing_found(view.input_shape, "the update is zero; it has no direction")
        like = next(iter(g.values()))
        y = observed.known_labels(view, self.labels)
        replay = view.replayer()
        distance = DISTANCES[self.distance]
        if self.top is not None:
            distance = matching.subset(distance, matching.largest(g, self.top))
        tv_weight = self.tv_weight * (view.num_examples if self.tv_per_example else 1)

        def objective(variables: descent.Variables, t: Tensor) -> descent.Value:
            del t
            x = variables["x"]
            match = distance(replay(x, y), g)
            return descent.Value(match + tv_weight * priors.tv_mean(x), match)

        start = init.normal((self.restarts, *view.batch_shape), generator=generator, like=like)
        found = descent.descend(
            objective,
            {"x": start},
            candidates=self.restarts,
            optimizer=descent.sgd(self.lr) if self.optimizer == "sign" else descent.adam(self.lr),
            steps=self.steps,
            watch=watch,
            schedule=descent.step_decay((3 / 8, 5 / 8, 7 / 8))
            if self.schedule == "steps"
            else descent.cosine_decay(),
            transform=None if self.optimizer == "unsigned" else descent.signed,
            after=(descent.inside(view.box, "x"),),
        )
        loss = float(found.criterion.min())
        x_hat = found.chosen()["x"]
        return Reconstruction(
            images=x_hat,
            labels=y,
            confidence=torch.full((len(x_hat),), -loss, dtype=torch.float64),
            notes={
                "matching_loss": loss,
                "iterations": float(found.steps),
                "restarts": float(self.restarts),
                "halted_restarts": float((~found.alive).sum()),
                "labels_granted": float(view.has("labels")),
            },
        ).or_failed(found.trouble)
